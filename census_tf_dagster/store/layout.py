"""Names the paths in the store, below ``{store}/{set}/{release}/{first 12 hex digits of the identity}/``.

Only this module knows these paths. It reads and writes nothing.
"""

from dataclasses import dataclass

from census_tf_dagster.identity import ArrayIdentity
from census_tf_dagster.io.names import require_name


@dataclass(frozen=True)
class ReleaseFolder:
    """The paths of one set, release and identity."""

    root: str

    @classmethod
    def of(cls, store: str, set_name: str, release: str, identity: ArrayIdentity) -> "ReleaseFolder":
        """Return the folder for an identity."""
        require_name(set_name, "set")
        require_name(release, "release")
        return cls(f"{store}/{set_name}/{release}/{identity.digest[:12]}")

    @property
    def set_folder(self) -> str:
        """Folder of the set, with one folder for each release."""
        return self.root.rsplit("/", 2)[0]

    @property
    def release(self) -> str:
        """Name of the release."""
        return self.root.rsplit("/", 2)[1]

    @property
    def name(self) -> str:
        """``{release}/{identity}``, to tell a person."""
        return self.root.removeprefix(f"{self.set_folder}/")

    @property
    def store(self) -> str:
        """Address of the store."""
        return self.root.rsplit("/", 3)[0]

    @property
    def canary(self) -> str:
        """File with the rate that the set's last canary measured."""
        return f"{self.set_folder}/canary.json"

    @property
    def plan(self) -> str:
        """Folder of the plans."""
        return f"{self.root}/plan"

    @property
    def planned_identity(self) -> str:
        """File with the identity of the current plan."""
        return f"{self.plan}/identity.json"

    @property
    def obs_ids(self) -> str:
        """File with the consumers' list of planned cells."""
        return f"{self.root}/obs_ids.parquet"

    @property
    def array(self) -> str:
        """The SOMA array."""
        return f"{self.root}/embeddings"

    @property
    def meta(self) -> str:
        """File with a published array's metadata, in the format of the Census's tool for contributed embeddings."""
        return f"{self.root}/meta.yml"

    def verification(self, plan: str, shard: int) -> str:
        """Return the file of a shard's verification."""
        return f"{self.root}/verification/{plan}/{shard:05d}.json"

    def notes(self, plan: str, shard: int) -> str:
        """Return the folder with the notes of a shard's runs about the megabatches that they write."""
        return f"{self.root}/written/{plan}/{shard:05d}"

    @property
    def qc(self) -> str:
        """Folder of the quality report: `report.json`, pictures, and the distribution for the next release's drift."""
        return f"{self.root}/qc"

    def comparison(self, plan: str, shard: int) -> str:
        """Return the file of a shard's comparison with upstream's own code."""
        return f"{self.qc}/upstream/{plan}/{shard:05d}.json"

    @property
    def index(self) -> str:
        """Folder of the index for searches."""
        return f"{self.root}/index"
