"""What IAM policies allow: Allow, Deny, wildcards and the few conditions that deploy/ecs/template.yaml uses.

moto enforces policies, but looks at resources for S3 only and at no condition; where it does look, tests compare this
with it.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

Document = Mapping[str, Any]


def allowed(documents: Iterable[Document], action: str, resource: str, **context: str) -> bool:
    """Whether policies of one role allow an action on a resource; `context` has `aws__SourceAccount` for
    `aws:SourceAccount`."""
    values = {key.replace("__", ":"): value for key, value in context.items()}
    effects = {
        statement["Effect"]
        for document in documents
        for statement in document["Statement"]
        if _any(statement["Action"], action, ignore_case=True)
        and _any(statement["Resource"], resource)
        and _holds(statement.get("Condition", {}), values)
    }
    assert effects <= {"Allow", "Deny"}
    return effects == {"Allow"}


def _any(patterns: str | list[str], value: str, *, ignore_case: bool = False) -> bool:
    flags = re.IGNORECASE if ignore_case else 0
    return any(
        re.fullmatch(re.escape(one).replace(r"\*", ".*").replace(r"\?", "."), value, flags)
        for one in ([patterns] if isinstance(patterns, str) else patterns)
    )


def _holds(condition: Mapping[str, Mapping[str, Any]], context: Mapping[str, str]) -> bool:
    unknown = condition.keys() - {"StringEquals", "ArnEquals", "Bool"}
    assert not unknown, f"conditions that are not understood here: {unknown}"
    return all(
        key in context and context[key] in ([wanted] if isinstance(wanted, str) else wanted)
        for wants in condition.values()
        for key, wanted in wants.items()
    )
