"""deploy/ecs/template.yaml applied to moto. What moto's CloudFormation does not create is created by hand."""

import ast
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cfnlint.decode.cfn_yaml
import requests

from tests.support.cfn_conditions import applied, refusals
from tests.support.moto_servers import client, moto_server
from tests.support.project import REPOSITORY

TEMPLATE = REPOSITORY / "deploy" / "ecs" / "template.yaml"
NAME = "census-tf"
IMAGES = {
    "ControlImage": "registry.example/census-tf-control:0.1.0",
    "WorkerImage": "registry.example/census-tf-worker:0.1.0",
}
NOT_IN_MOTO = {
    "AWS::SecretsManager::Secret": "made by hand, and its ARN handed to the template as a parameter",
    "AWS::ECS::CapacityProvider": "made by hand from the template's properties",
    "AWS::ECS::ClusterCapacityProviderAssociations": "made by hand from the template's properties",
    "AWS::S3::BucketPolicy": "not made; evaluated as text",
}
"""The types that moto 5.2 silently leaves out of a stack, and what the tests do instead."""


def read_template() -> dict[str, Any]:
    """The template with its short forms (!Ref) written out."""
    found: dict[str, Any] = json.loads(json.dumps(cfnlint.decode.cfn_yaml.load(str(TEMPLATE))))
    return found


@dataclass(frozen=True)
class Stack:
    """A created stack."""

    endpoint: str
    template: dict[str, Any]
    """As its parameters decide: only with what is made."""
    physical: dict[str, str]
    secret: str
    """ARN of the database's secret."""

    def client(self, service: str) -> Any:
        return client(self.endpoint, service)

    def of_type(self, kind: str) -> dict[str, dict[str, Any]]:
        return {name: one for name, one in self.template["Resources"].items() if one["Type"] == kind}

    def role(self, name: str) -> str:
        arn: str = self.client("iam").get_role(RoleName=self.physical[name])["Role"]["Arn"]
        return arn

    def policies(self, name: str) -> list[dict[str, Any]]:
        """The role's own policies, with every reference resolved."""
        iam, role = self.client("iam"), self.physical[name]
        named = iam.list_role_policies(RoleName=role)["PolicyNames"]
        return [iam.get_role_policy(RoleName=role, PolicyName=one)["PolicyDocument"] for one in named]

    def task(self, family: str) -> dict[str, Any]:
        """A task definition, as ECS returns it."""
        found: dict[str, Any] = self.client("ecs").describe_task_definition(taskDefinition=family)["taskDefinition"]
        return found

    def environment(self, family: str, container: str) -> dict[str, str]:
        (found,) = [one for one in self.task(family)["containerDefinitions"] if one["name"] == container]
        return {one["name"]: one["value"] for one in found["environment"]}

    def credentials(self, name: str) -> dict[str, str]:
        """The keys of a role, as a task receives them."""
        keys = self.client("sts").assume_role(RoleArn=self.role(name), RoleSessionName="test")["Credentials"]
        return {
            "AWS_ACCESS_KEY_ID": keys["AccessKeyId"],
            "AWS_SECRET_ACCESS_KEY": keys["SecretAccessKey"],
            "AWS_SESSION_TOKEN": keys["SessionToken"],
        }

    def outputs(self) -> dict[str, str]:
        """The stack's outputs by key."""
        (found,) = self.client("cloudformation").describe_stacks(StackName=NAME)["Stacks"]
        return {one["OutputKey"]: one["OutputValue"] for one in found["Outputs"]}

    def capacity_providers(self) -> list[dict[str, Any]]:
        """The stack's own services, as ECS returns them."""
        named = [_provider_name(one) for one in self.of_type("AWS::ECS::CapacityProvider").values()]
        found = self.client("ecs").describe_capacity_providers(capacityProviders=named)["capacityProviders"]
        assert len(found) == len(named)
        return list(found)

    def enforce(self, *, on: bool) -> None:
        """From now on, tell moto whether every request needs a key that is allowed to send it."""
        free = b"0" if on else b"1000000"
        requests.post(f"{self.endpoint}/moto-api/reset-auth", data=free, timeout=10).raise_for_status()


@contextmanager
def ecs_stack(have: Callable[[str], dict[str, str]] | None = None, **parameters: str) -> Iterator[Stack]:
    """Create the stack on its own moto server; `have` first makes what the account has, and returns parameters."""
    with moto_server() as endpoint:
        template = read_template()
        given = {**IMAGES, **parameters, **(have(endpoint) if have else {})}
        assert refusals(template, **given) == []
        secret = client(endpoint, "secretsmanager").create_secret(Name="database", SecretString='{"password": "x"}')
        usable = {
            **template,
            "Parameters": {**template["Parameters"], "DatabaseSecret": {"Type": "String"}},
            "Resources": {key: one for key, one in template["Resources"].items() if key != "DatabaseSecret"},
        }
        values = {**given, "DatabaseSecret": secret["ARN"]}
        cloudformation = client(endpoint, "cloudformation")
        cloudformation.create_stack(
            StackName=NAME,
            TemplateBody=json.dumps(usable),
            Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in values.items()],
            Capabilities=["CAPABILITY_IAM"],
        )
        made = cloudformation.describe_stack_resources(StackName=NAME)["StackResources"]
        named = [one for one in made if one.get("LogicalResourceId")]
        physical = {one["LogicalResourceId"]: one.get("PhysicalResourceId", "") for one in named}
        _write_policies_again(endpoint, physical)
        stack = Stack(endpoint, applied(template, **given), physical, given.get("DatabaseSecretArn", secret["ARN"]))
        _make_capacity_providers(stack)
        yield stack


def _write_policies_again(endpoint: str, physical: dict[str, str]) -> None:
    """Correct policies: moto's CloudFormation stores them as Python prints them, which its IAM cannot read."""
    iam = client(endpoint, "iam")
    for name in [one for one in physical if one.endswith("Role")]:
        role = physical[name]
        for policy in iam.list_role_policies(RoleName=role)["PolicyNames"]:
            document = iam.get_role_policy(RoleName=role, PolicyName=policy)["PolicyDocument"]
            said = ast.literal_eval(document) if isinstance(document, str) else document
            iam.put_role_policy(RoleName=role, PolicyName=policy, PolicyDocument=json.dumps(said))


def _make_capacity_providers(stack: Stack) -> None:
    ecs, autoscaling = stack.client("ecs"), stack.client("autoscaling")
    names = []
    for one in stack.of_type("AWS::ECS::CapacityProvider").values():
        properties = one["Properties"]
        group = stack.physical[properties["AutoScalingGroupProvider"]["AutoScalingGroupArn"]["Ref"]]
        (found,) = autoscaling.describe_auto_scaling_groups(AutoScalingGroupNames=[group])["AutoScalingGroups"]
        name = _provider_name(one)
        scaling = {
            key[0].lower() + key[1:]: value
            for key, value in properties["AutoScalingGroupProvider"]["ManagedScaling"].items()
        }
        provider = {"autoScalingGroupArn": found["AutoScalingGroupARN"], "managedScaling": scaling}
        ecs.create_capacity_provider(name=name, autoScalingGroupProvider=provider)
        names.append(name)
    strategy = [{"capacityProvider": "FARGATE", "weight": 1}]
    ecs.put_cluster_capacity_providers(
        cluster=NAME, capacityProviders=["FARGATE", *names], defaultCapacityProviderStrategy=strategy
    )


def _provider_name(resource: dict[str, Any]) -> str:
    name: str = resource["Properties"]["Name"]["Fn::Sub"]
    return name.replace("${AWS::StackName}", NAME)
