"""Facts from AWS's documentation that moto does not have, or has differently.

Every table names its source. A type, attribute or action that a table lacks is an error in the tests, so that nobody
uses one whose documentation was not read.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

PARTITION, REGION, ACCOUNT = "aws", "us-west-2", "123456789012"
PSEUDO = {"AWS::Partition": PARTITION, "AWS::Region": REGION, "AWS::AccountId": ACCOUNT, "AWS::StackName": "census-tf"}

RETURN_VALUES: Mapping[str, Mapping[str, str]] = {
    "AWS::ECS::Cluster": {"Ref": "{name}", "Arn": "arn:aws:ecs:us-west-2:123456789012:cluster/{name}"},
    "AWS::IAM::Role": {"Ref": "{name}", "Arn": "arn:aws:iam::123456789012:role/{name}"},
    "AWS::Logs::LogGroup": {"Ref": "{name}", "Arn": "arn:aws:logs:us-west-2:123456789012:log-group:{name}:*"},
    "AWS::S3::Bucket": {"Ref": "{name}", "Arn": "arn:aws:s3:::{name}"},
    "AWS::SecretsManager::Secret": {"Ref": "arn:aws:secretsmanager:us-west-2:123456789012:secret:{name}-a1b2c3"},
}
"""What Ref and Fn::GetAtt return: section "Return values" of each type's page in the CloudFormation Template Reference,
docs.aws.amazon.com/AWSCloudFormation/latest/TemplateReference/aws-resource-logs-loggroup.html and so on."""

ARN_FORMATS: Mapping[str, str] = {
    "ecr:repository": "arn:aws:ecr:us-west-2:123456789012:repository/<repository>",
    "ecs:task": "arn:aws:ecs:us-west-2:123456789012:task/<cluster>/<task>",
    "ecs:task-definition": "arn:aws:ecs:us-west-2:123456789012:task-definition/<family>:<revision>",
    "iam:role": "arn:aws:iam::123456789012:role/<role>",
    "kms:key": "arn:aws:kms:us-west-2:123456789012:key/<key>",
    "logs:log-stream": "arn:aws:logs:us-west-2:123456789012:log-group:<group>:log-stream:<stream>",
    "s3:bucket": "arn:aws:s3:::<bucket>",
    "s3:object": "arn:aws:s3:::<bucket>/<key>",
    "sns:topic": "arn:aws:sns:us-west-2:123456789012:<topic>",
    "secretsmanager:secret": "arn:aws:secretsmanager:us-west-2:123456789012:secret:<secret>",
}
"""ARNs of the resource types: table "Resource types" of each service in the Service Authorization Reference,
docs.aws.amazon.com/service-authorization/latest/reference/list_amazoncloudwatchlogs.html and so on."""

RESOURCE_TYPES: Mapping[str, str | None] = {
    "ec2:DescribeNetworkInterfaces": None,
    "ecr:BatchCheckLayerAvailability": "repository",
    "ecr:BatchGetImage": "repository",
    "ecr:GetAuthorizationToken": None,
    "ecr:GetDownloadUrlForLayer": "repository",
    "ecs:DescribeTaskDefinition": None,
    "ecs:DescribeTasks": "task",
    "ecs:RunTask": "task-definition",
    "ecs:StopTask": "task",
    "ecs:TagResource": "task",
    "iam:PassRole": "role",
    "kms:Decrypt": "key",
    "kms:GenerateDataKey": "key",
    "logs:CreateLogStream": "log-stream",
    "logs:GetLogEvents": "log-stream",
    "logs:PutLogEvents": "log-stream",
    "s3:AbortMultipartUpload": "object",
    "s3:DeleteObject": "object",
    "s3:GetObject": "object",
    "s3:ListBucket": "bucket",
    "s3:ListBucketMultipartUploads": "bucket",
    "s3:ListMultipartUploadParts": "object",
    "s3:PutObject": "object",
    "secretsmanager:GetSecretValue": "secret",
    "sns:Publish": "topic",
    "ssmmessages:CreateControlChannel": None,
    "ssmmessages:CreateDataChannel": None,
    "ssmmessages:OpenControlChannel": None,
    "ssmmessages:OpenDataChannel": None,
}
"""Resource type of each action, or None if it takes only `*`: table "Actions" of the same pages. cfn-lint has a copy of
this column, with which the tests compare this table."""


@dataclass(frozen=True)
class InstanceType:
    """Size of an EC2 instance type."""

    vcpus: int
    memory_gib: int
    gpus: int
    gpu_memory_gb: int


INSTANCE_TYPES: Mapping[str, InstanceType] = {
    "g5.xlarge": InstanceType(4, 16, 1, 24),
    "g5.2xlarge": InstanceType(8, 32, 1, 24),
    "g6.xlarge": InstanceType(4, 16, 1, 24),
    "g6.2xlarge": InstanceType(8, 32, 1, 24),
    "g6e.xlarge": InstanceType(4, 32, 1, 48),
    "g6e.2xlarge": InstanceType(8, 64, 1, 48),
}
"""aws.amazon.com/ec2/instance-types/g5, /g6 and /g6e. The GPUs are A10G, L4 and L40S. moto has a copy of EC2's
DescribeInstanceTypes, with which the tests compare this table."""


def resolve(template: Mapping[str, Any], value: Any) -> Any:
    """Replace Ref, Fn::Sub and Fn::GetAtt in a part of a template by what AWS documents that they return."""
    if isinstance(value, list):
        return [resolve(template, one) for one in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"Ref"}:
        return _returned(template, value["Ref"], "Ref")
    if value.keys() == {"Fn::GetAtt"}:
        name, attribute = value["Fn::GetAtt"]
        return _returned(template, name, attribute)
    if value.keys() == {"Fn::Sub"}:
        return re.sub(
            r"\$\{([\w:]+)(?:\.(\w+))?\}", lambda one: _returned(template, one[1], one[2] or "Ref"), value["Fn::Sub"]
        )
    return {key: resolve(template, one) for key, one in value.items()}


def documented_policies(template: Mapping[str, Any], role: str) -> list[dict[str, Any]]:
    """The policies of a template's role, with every reference resolved."""
    found = template["Resources"][role]["Properties"].get("Policies", [])
    return [resolve(template, one["PolicyDocument"]) for one in found]


def _returned(template: Mapping[str, Any], name: str, attribute: str) -> str:
    if name in PSEUDO:
        return PSEUDO[name]
    resource = template["Resources"][name]
    own = [one for key, one in resource.get("Properties", {}).items() if key in ("ClusterName", "LogGroupName")]
    return RETURN_VALUES[resource["Type"]][attribute].format(name=resolve(template, own[0]) if own else name.lower())


def resource_type(action: str) -> str | None:
    """The type of an action's resources, such as `logs:log-stream`."""
    found = RESOURCE_TYPES[action]
    return found and f"{action.partition(':')[0]}:{found}"


def can_match(pattern: str, kind: str) -> bool:
    """Whether a policy's resource, which may have `*`, matches at least one ARN of a resource type.

    A name in an ARN has at least one character, and no colon.
    """
    form = [one[0] if one[0] != "<" else "" for one in re.findall(r"<\w+>|.", ARN_FORMATS[kind])]

    @cache
    def meet(left: int, right: int) -> bool:
        if left == len(pattern):
            return right == len(form)
        if pattern[left] == "*":
            return meet(left + 1, right) or (right < len(form) and meet(left, right + 1))
        if right == len(form):
            return False
        if form[right] == "":
            return pattern[left] != ":" and (meet(left + 1, right) or meet(left + 1, right + 1))
        return pattern[left] == form[right] and meet(left + 1, right + 1)

    return meet(0, 0)
