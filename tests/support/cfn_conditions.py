"""What CloudFormation makes of a template's conditions with given parameters, and what its rules refuse.

Sources: "Condition functions", "Rules", "Condition attribute" and "DependsOn attribute" of the CloudFormation Template
Reference, docs.aws.amazon.com/AWSCloudFormation/latest/TemplateReference. A resource that depends on one that is not
made is not made either, "regardless of their own conditions": the tests count that as a fault.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

Template = dict[str, Any]
_NOTHING = object()
_NAMED = re.compile(r"\$\{(?!!)([\w:]+)(\.[\w.]+)?\}")


def applied(template: Template, **parameters: str) -> Template:
    """The template with these parameters: conditions decided, parameters filled in, and only what is made."""
    values = _values(template, parameters)
    conditions = {name: _evaluated(one, values, {}) for name, one in template.get("Conditions", {}).items()}
    found = dict(template)
    for section in ("Resources", "Outputs"):
        made = {
            name: one
            for name, one in template.get(section, {}).items()
            if conditions.get(one.get("Condition"), "Condition" not in one)
        }
        found[section] = _evaluated(made, values, conditions)
    return found


def refusals(template: Template, **parameters: str) -> list[str]:
    """The descriptions of all assertions that these parameters violate."""
    values = _values(template, parameters)
    return [
        one["AssertDescription"]
        for rule in template.get("Rules", {}).values()
        if _evaluated(rule.get("RuleCondition", True), values, {})
        for one in rule["Assertions"]
        if not _evaluated(one["Assert"], values, {})
    ]


def dangling(template: Template) -> list[str]:
    """Every reference of an applied template to something that is not made, with the place that has it."""
    known = template["Resources"].keys()
    found = []
    for section in ("Resources", "Outputs"):
        for name, one in template[section].items():
            needed = one.get("DependsOn", []) if section == "Resources" else []
            depends = [needed] if isinstance(needed, str) else needed
            found += [f"{name} -> {to}" for to in [*depends, *_references(one)] if to not in known]
    return found


def _values(template: Template, parameters: Mapping[str, str]) -> dict[str, str]:
    assert parameters.keys() <= template["Parameters"].keys()
    defaults = {name: str(one["Default"]) for name, one in template["Parameters"].items() if "Default" in one}
    values = defaults | parameters
    assert values.keys() == template["Parameters"].keys()
    return values


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for one in value:
            yield from _references(one)
    elif isinstance(value, dict):
        if value.keys() == {"Ref"}:
            yield from [value["Ref"]] if not value["Ref"].startswith("AWS::") else []
        elif value.keys() == {"Fn::GetAtt"}:
            yield value["Fn::GetAtt"][0]
        elif value.keys() == {"Fn::Sub"}:
            yield from (one[1] for one in _NAMED.finditer(value["Fn::Sub"]) if not one[1].startswith("AWS::"))
        else:
            for one in value.values():
                yield from _references(one)


def _evaluated(value: Any, values: Mapping[str, str], conditions: Mapping[str, bool]) -> Any:
    if isinstance(value, list):
        items = [_evaluated(one, values, conditions) for one in value]
        return [one for one in items if one is not _NOTHING]
    if not isinstance(value, dict):
        return value
    (function, argument) = next(iter(value.items())) if len(value) == 1 else ("", None)
    if function == "Ref":
        return _NOTHING if argument == "AWS::NoValue" else values.get(argument, value)
    if function == "Fn::If":
        name, then, otherwise = argument
        return _evaluated(then if conditions[name] else otherwise, values, conditions)
    if function == "Fn::Sub":
        text = _NAMED.sub(lambda one: values.get(one[1], one[0]) if not one[2] else one[0], argument)
        return {"Fn::Sub": text} if _NAMED.search(text) else text
    inside = {key: _evaluated(one, values, conditions) for key, one in value.items()}
    inside = {key: one for key, one in inside.items() if one is not _NOTHING}
    plain = inside.get(function)
    if function == "Fn::Equals":
        return plain[0] == plain[1]
    if function == "Fn::Not":
        return not plain[0]
    if function == "Fn::Split" and isinstance(plain[1], str):
        return plain[1].split(plain[0])
    if function == "Fn::Join" and all(isinstance(one, str) for one in plain[1]):
        return plain[0].join(plain[1])
    if function == "Fn::Select" and isinstance(plain[1], list):
        return plain[1][int(plain[0])]
    return inside
