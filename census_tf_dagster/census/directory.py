"""Reads the Census release directory: which releases exist, how long they stay, and which were withdrawn.

cellxgene_census's own function is not used here: it waits forever for a server that does not answer, follows aliases
that name each other without end, and importing it takes seconds, while a sensor in Dagster's code server needs an
answer in time.

Opening a release belongs in `release`.
"""

import calendar
import json
import re
import time
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any
from urllib.parse import urlparse

import requests
import urllib3
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from census_tf_dagster.errors import DirectoryError, UserError

PUBLIC_DIRECTORY = "https://census.cellxgene.cziscience.com/cellxgene-census/v1/release.json"
"""The directory that cellxgene_census reads (`_release_directory.CELL_CENSUS_RELEASE_DIRECTORY_URL`)."""

USER_AGENT = "census-tf-dagster"

MOST_BYTES, CHUNK_BYTES = 16 * 2**20, 2**16
"""The directory has some ten thousand bytes."""

PATIENCE_SECONDS = 45.0
"""How long to wait for the directory. Dagster gives a sensor 60 seconds."""

WEEKLY_MONTHS = 1
"""How long weekly releases stay: "available for public access for 1 month" (Census data releases, November 2025)."""

NAME = re.compile(r"\d{4}-\d{2}-\d{2}")
"""A release is named by its day. Other names (stable, latest, V2) are aliases, which may change or disappear."""

UNREACHABLE = "the Census release directory cannot be reached"
ELSEWHERE = (
    ". Expected an answer from it: behind a proxy, set HTTPS_PROXY; to use a mirror of release.json, set "
    "CENSUS_TF_CENSUS_DIRECTORY to its address"
)


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class _Flags(_Model):
    lts: bool = False
    retracted: bool = False


class Retraction(_Model):
    """When and why a release was withdrawn, as the directory states it."""

    date: str
    reason: str | None = None
    info_url: str | None = None
    replaced_by: str | None = None

    def __str__(self) -> str:
        more = [self.reason, f"replaced by {self.replaced_by}" if self.replaced_by else None, self.info_url]
        return "; ".join([f"retracted on {self.date}", *(part for part in more if part)])


class _Soma(_Model):
    uri: str = Field(min_length=1)
    s3_region: str | None = None


class _Entry(_Model):
    release_build: str = Field(pattern=rf"^{NAME.pattern}$")
    soma: _Soma
    flags: _Flags = _Flags()
    retraction: Retraction | None = None


@dataclass(frozen=True)
class ListedRelease:
    """A release in the directory.

    Attributes
    ----------
    name
        Its day, such as 2025-11-08.
    built
        Day of its build.
    long_term
        Whether it is kept for at least five years; otherwise it is a weekly release.
    retraction
        Why it was withdrawn; None if it was not.
    uri
        Address of its SOMA objects.
    s3_region
        Region of that bucket; empty if the directory does not state it.
    """

    name: str
    built: date
    long_term: bool
    retraction: Retraction | None
    uri: str
    s3_region: str = ""

    @property
    def deleted_from(self) -> date | None:
        """The first day on which a weekly release may be deleted, by policy; None for long-term releases.

        The directory does not state the day. A release is published some days after its build, so this is the earliest
        possible day.
        """
        return None if self.long_term else _months_later(self.built, WEEKLY_MONTHS)

    @property
    def kind(self) -> str:
        """``long-term`` or ``weekly``."""
        return "long-term" if self.long_term else "weekly"

    def objections(self, finish: datetime | None) -> list[str]:
        """Return the reasons against starting work on this release automatically; empty if there are none.

        Parameters
        ----------
        finish
            When the work would end; None if that is unknown. Then every weekly release has an objection.
        """
        found = [f"the release was {self.retraction}"] if self.retraction else []
        if self.deleted_from is not None and (finish is None or finish.date() >= self.deleted_from):
            when = (
                f"on {finish:%Y-%m-%d}"
                if finish
                else "on a day that is not known yet (no measured rate, or no fleet_gpus)"
            )
            found.append(f"the weekly release may be deleted from {self.deleted_from}, and the work would end {when}")
        return found


@dataclass(frozen=True)
class Directory:
    """The directory's releases, latest first, and a message about each entry that is malformed."""

    releases: tuple[ListedRelease, ...]
    malformed: tuple[str, ...]

    def find(self, name: str) -> ListedRelease | None:
        """Return a release by its name; None if the directory does not list it."""
        return next((release for release in self.releases if release.name == name), None)


def read_directory(url: str = "", patience: float = PATIENCE_SECONDS) -> Directory:
    """Read the Census release directory.

    Parameters
    ----------
    url
        Address of the directory; empty: `PUBLIC_DIRECTORY`.
    patience
        Seconds that reading may take.

    Raises
    ------
    UserError
        When `url` is not an http address.
    DirectoryError
        When the directory does not answer in time, or the answer is not a directory.
    """
    if url and (urlparse(url).scheme not in ("http", "https") or not urlparse(url).netloc):
        raise UserError(
            f"the Census directory's address is {url!r}; expected http(s)://HOST/.../release.json. Correct or unset "
            "CENSUS_TF_CENSUS_DIRECTORY."
        )
    where = f" at {url}" if url else ""
    try:
        entries = json.loads(_fetch(url or PUBLIC_DIRECTORY, time.monotonic() + patience))
    except (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError) as error:
        raise DirectoryError(f"{UNREACHABLE}{where}: no answer in {patience:.0f} s{ELSEWHERE}.") from error
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise DirectoryError(f"{UNREACHABLE}{where}: {type(error).__name__}: {error}{ELSEWHERE}.") from error
    except ValueError as error:
        raise DirectoryError(f"the Census release directory{where} is malformed: it is not JSON ({error})") from error
    if not isinstance(entries, dict):
        kind = type(entries).__name__
        raise DirectoryError(
            f"the Census release directory{where} is malformed: its JSON is a {kind}, not an object of releases"
        )
    return parse_directory(entries)


def _fetch(url: str, deadline: float) -> bytes:
    """Return the content of a small page.

    `requests` limits the time of each read, not of the whole, so that a server which sends a byte now and then would
    hold the caller for ever.
    """
    read = b""
    left = deadline - time.monotonic()
    with requests.get(url, headers={"User-Agent": USER_AGENT}, stream=True, timeout=left) as answer:
        answer.raise_for_status()
        # `iter_content` would wait until a part is complete.
        while part := answer.raw.read1(CHUNK_BYTES, decode_content=True):
            read += part
            if time.monotonic() > deadline:
                raise TimeoutError
            if len(read) > MOST_BYTES:
                raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
    return read


def parse_directory(entries: dict[str, Any]) -> Directory:
    """Check the entries of the directory, one by one. Aliases are left out: names that are no day, and texts.

    Raises
    ------
    DirectoryError
        When no entry is a release.
    """
    releases: list[ListedRelease] = []
    malformed: list[str] = []
    dated = {name: value for name, value in entries.items() if NAME.fullmatch(name) and not isinstance(value, str)}
    for name in sorted(dated, reverse=True):
        try:
            releases.append(_release(name, _Entry.model_validate(dated[name])))
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors())
            malformed.append(f"{name}: {wrong}")
        except ValueError as error:
            malformed.append(f"{name}: {error}")
    if not releases:
        raise DirectoryError(
            "the Census release directory is malformed: it lists no release that is named by its day. "
            + ("; ".join(malformed) or f"It lists: {', '.join(sorted(entries)[:10]) or 'nothing'}")
        )
    return Directory(tuple(releases), tuple(malformed))


def _release(name: str, entry: _Entry) -> ListedRelease:
    retraction = entry.retraction
    if entry.flags.retracted and retraction is None:
        retraction = Retraction(date="an unknown day")
    return ListedRelease(
        name=name,
        built=date.fromisoformat(entry.release_build),
        long_term=entry.flags.lts,
        retraction=retraction if entry.flags.retracted else None,
        uri=entry.soma.uri.rstrip("/"),
        s3_region=entry.soma.s3_region or "",
    )


def _months_later(day: date, months: int) -> date:
    year, month = divmod(day.year * 12 + day.month - 1 + months, 12)
    return date(year, month + 1, min(day.day, calendar.monthrange(year, month + 1)[1]))
