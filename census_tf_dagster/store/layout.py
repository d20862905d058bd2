"""Where things stand in the store: ``{store}/{set}/{release}/{first 12 hex of the identity}/``."""

from dataclasses import dataclass

from census_tf_dagster.identity import Identity
from census_tf_dagster.io.names import require_name


@dataclass(frozen=True)
class ReleaseFolder:
    """The places of one set, release and identity."""

    root: str

    @classmethod
    def of(cls, store: str, set_name: str, release: str, identity: Identity) -> "ReleaseFolder":
        """Return the folder for an identity."""
        require_name(set_name, "set")
        require_name(release, "release")
        return cls(f"{store}/{set_name}/{release}/{identity.digest[:12]}")

    @property
    def store(self) -> str:
        """The store."""
        return self.root.rsplit("/", 3)[0]

    @property
    def canary(self) -> str:
        """What the last canary of the set found of its speed."""
        return f"{self.root.rsplit('/', 2)[0]}/canary.json"

    @property
    def plan(self) -> str:
        """Folder of the plans."""
        return f"{self.root}/plan"

    @property
    def obs_ids(self) -> str:
        """The consumers' list of planned ids."""
        return f"{self.root}/obs_ids.parquet"

    @property
    def array(self) -> str:
        """The SOMA array."""
        return f"{self.root}/embeddings"

    @property
    def meta(self) -> str:
        """What a published array says of itself, as the Census's tool for contributed embeddings takes it."""
        return f"{self.root}/meta.yml"

    def verification(self, plan: str, shard: int) -> str:
        """Return where the verification of a shard stands."""
        return f"{self.root}/verification/{plan}/{shard:05d}.json"

    def notes(self, plan: str, shard: int) -> str:
        """Return the folder where each run of a shard notes what it writes."""
        return f"{self.root}/written/{plan}/{shard:05d}"

    @property
    def qc(self) -> str:
        """Folder of the quality report: `report.json`, pictures, the distribution that the next release is held to."""
        return f"{self.root}/qc"

    def comparison(self, plan: str, shard: int) -> str:
        """Return where stands what upstream's own code made of some cells of a shard."""
        return f"{self.qc}/upstream/{plan}/{shard:05d}.json"
