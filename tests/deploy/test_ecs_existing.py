"""deploy/ecs/template.yaml in an account that has a network, a KMS key or a PostgreSQL."""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from census_tf_dagster.config.variables import alert_channel
from tests.support.aws_documented import documented_policies
from tests.support.cfn_conditions import applied, dangling, refusals
from tests.support.ecs_existing import EXISTING, VARIANTS
from tests.support.ecs_stack import IMAGES, TEMPLATE, Stack, ecs_stack, read_template
from tests.support.iam_policies import allowed
from tests.support.moto_servers import client

pytestmark = pytest.mark.takes(20)

CHOICES: dict[str, tuple[str, ...]] = {
    "network": ("VpcId", "SubnetIds"),
    "groups": ("SecurityGroupIds",),
    "key": ("KmsKeyArn",),
    "alerts": ("AlertTopicArn",),
    "database": ("DatabaseHost", "DatabaseSecretArn"),
}
"""What an account may have, and the parameters that say so."""
MIXES = [
    mix
    for length in range(len(CHOICES) + 1)
    for mix in itertools.combinations(CHOICES, length)
    if "groups" not in mix or "network" in mix
]
NEEDLESS = {
    "network": {
        *("Vpc", "InternetGateway", "InternetGatewayAttachment", "NatAddress", "NatGateway", "S3Endpoint"),
        *("PublicSubnet", "PublicRoutes", "PublicRoute", "PublicSubnetRoutes", "PrivateRoutes", "PrivateRoute"),
        *("PrivateSubnetA", "PrivateSubnetB", "PrivateSubnetC"),
        *("PrivateSubnetARoutes", "PrivateSubnetBRoutes", "PrivateSubnetCRoutes"),
    },
    "groups": {"TaskSecurityGroup"},
    "key": set(),
    "alerts": set(),
    "database": {"Database", "DatabaseSecret", "DatabaseSubnets", "DatabaseSecurityGroup"},
}
"""Resources that the stack does not make beside an existing one."""


def parameters(mix: tuple[str, ...]) -> dict[str, str]:
    return {name: EXISTING[name] for one in mix for name in CHOICES[one]}


def made(mix: tuple[str, ...]) -> dict[str, Any]:
    return applied(read_template(), **IMAGES, **parameters(mix))


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "+".join(mix) or "nothing")
def test_every_mix_is_whole_and_makes_nothing_needless(mix: tuple[str, ...]) -> None:
    assert refusals(read_template(), **IMAGES, **parameters(mix)) == []
    template = made(mix)
    assert dangling(template) == []
    left_out = read_template()["Resources"].keys() - template["Resources"].keys()
    assert left_out == set().union(*(NEEDLESS[one] for one in mix))


@pytest.mark.parametrize(
    ("path", "value", "wanted"),
    [
        (("ControlPlane", "DependsOn"), "PrivateRoute", "ControlPlane -> PrivateRoute"),
        (("DataBucket", "Properties", "BucketName"), {"Fn::Sub": "x-${Vpc.CidrBlock}"}, "DataBucket -> Vpc"),
        (("DataBucket", "Properties", "Tags"), [{"Key": "x", "Value": {"Ref": "Vpc"}}], "DataBucket -> Vpc"),
        (("LogBucket", "Properties", "BucketName"), {"Fn::GetAtt": ["Database", "Port"]}, "LogBucket -> Database"),
    ],
    ids=["DependsOn", "Sub", "Ref", "GetAtt"],
)
def test_what_is_not_made_is_found(path: tuple[str, ...], value: Any, wanted: str) -> None:
    """The test of this test."""
    template = read_template()
    inside = template["Resources"]
    for name in path[:-1]:
        inside = inside[name]
    inside[path[-1]] = value
    assert dangling(applied(template, **IMAGES)) == []
    assert wanted in dangling(applied(template, **IMAGES, **EXISTING))


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"VpcId"}, "SubnetIds"),
        ({"SubnetIds"}, "VpcId"),
        ({"SecurityGroupIds"}, "VpcId"),
        ({"DatabaseHost"}, "DatabaseSecretArn"),
        ({"DatabaseSecretArn"}, "DatabaseHost"),
    ],
)
def test_half_of_a_pair_is_refused(given: set[str], missing: str) -> None:
    (said,) = refusals(read_template(), **IMAGES, **{name: EXISTING[name] for name in given})
    assert said == f"{next(iter(given))} needs {missing}."


def test_patterns_take_what_aws_gives_and_no_password() -> None:
    declared = read_template()["Parameters"]
    for name, value in EXISTING.items():
        assert re.fullmatch(declared[name]["AllowedPattern"], value), name
        assert re.fullmatch(declared[name]["AllowedPattern"], ""), name
    secret = declared["DatabaseSecretArn"]["AllowedPattern"]
    managed = "arn:aws:secretsmanager:us-west-2:123456789012:secret:rds!db-1234abcd-12ab-34cd-56ef-1234567890ab-a1b2c3"
    assert re.fullmatch(secret, managed)
    # The role may read exactly this ARN, so a name alone is refused as well as a password.
    for wrong in ("correct horse battery staple", "team/dagster", managed.rpartition("-")[0] + ":password::"):
        assert not re.fullmatch(secret, wrong)


def test_the_template_can_be_sent_without_a_bucket() -> None:
    """CloudFormation takes 51,200 bytes in a request ("CloudFormation quotas" in its User Guide)."""
    assert TEMPLATE.stat().st_size <= 51_200


# What the roles may do with the key, and with the secret of an existing database.

KEY = EXISTING["KmsKeyArn"]
OTHER_KEY = KEY.replace("1234abcd", "ffffffff")


def via(service: str) -> dict[str, str]:
    return {"kms__ViaService": f"{service}.us-west-2.amazonaws.com"}


@pytest.mark.parametrize(
    ("role", "actions", "service"),
    [
        ("RunRole", {"kms:Decrypt", "kms:GenerateDataKey"}, "s3"),
        ("ControlRole", {"kms:Decrypt", "kms:GenerateDataKey"}, "s3"),
        ("ExecutionRole", {"kms:Decrypt"}, "secretsmanager"),
    ],
)
def test_a_role_uses_the_key_through_its_own_service_only(role: str, actions: set[str], service: str) -> None:
    documents = documented_policies(VARIANTS["existing "], role)
    tried = {"kms:Decrypt", "kms:GenerateDataKey", "kms:Encrypt", "kms:CreateGrant", "kms:ScheduleKeyDeletion"}
    assert {one for one in tried if allowed(documents, one, KEY, **via(service))} == actions
    for action in actions:
        assert not allowed(documents, action, KEY)
        assert not allowed(documents, action, KEY, **via("ec2"))
        assert not allowed(documents, action, OTHER_KEY, **via(service))
        assert not allowed(documented_policies(VARIANTS[""], role), action, KEY, **via(service))


def test_only_the_secret_of_the_existing_database_is_read() -> None:
    read, existing = "secretsmanager:GetSecretValue", VARIANTS["existing "]
    for role in ("ExecutionRole", "ControlRole", "RunRole"):
        documents = documented_policies(existing, role)
        assert allowed(documents, read, EXISTING["DatabaseSecretArn"]) is (role == "ExecutionRole")
        assert not allowed(documents, read, EXISTING["DatabaseSecretArn"].replace("team", "other"))


def test_only_the_control_plane_sends_alerts_and_only_to_the_topic() -> None:
    arn = EXISTING["AlertTopicArn"]
    for role in ("ExecutionRole", "ControlRole", "RunRole"):
        documents = documented_policies(VARIANTS["existing "], role)
        assert allowed(documents, "sns:Publish", arn) is (role == "ControlRole")
        assert not allowed(documents, "sns:Publish", f"{arn}-of-others")
        assert not allowed(documented_policies(VARIANTS[""], role), "sns:Publish", arn)


# A whole stack on moto, which decides the conditions itself.


def have_everything(endpoint: str) -> dict[str, str]:
    """Make network, key and secret of an account, and return the parameters that name them."""
    ec2 = client(endpoint, "ec2")
    vpc = ec2.create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
    zones = [one["ZoneName"] for one in ec2.describe_availability_zones()["AvailabilityZones"]][:2]
    subnets = [
        ec2.create_subnet(VpcId=vpc, CidrBlock=f"10.9.{number}.0/24", AvailabilityZone=zone)["Subnet"]["SubnetId"]
        for number, zone in enumerate(zones)
    ]
    groups = [
        ec2.create_security_group(GroupName=f"group-{number}", Description="theirs", VpcId=vpc)["GroupId"]
        for number in range(2)
    ]
    secret = client(endpoint, "secretsmanager").create_secret(Name="team/dagster", SecretString='{"password": "x"}')
    return {
        "VpcId": vpc,
        "SubnetIds": ",".join(subnets),
        "SecurityGroupIds": ",".join(groups),
        "KmsKeyArn": client(endpoint, "kms").create_key()["KeyMetadata"]["Arn"],
        "AlertTopicArn": client(endpoint, "sns").create_topic(Name="alerts")["TopicArn"],
        "DatabaseHost": "postgres.example",
        "DatabasePort": "6432",
        "DatabaseName": "census",
        "DatabaseUser": "census_tf",
        "DatabaseSecretArn": secret["ARN"],
    }


@pytest.fixture(scope="module")
def given() -> dict[str, str]:
    return {}


@pytest.fixture(scope="module")
def stack(given: dict[str, str]) -> Iterator[Stack]:
    def have(endpoint: str) -> dict[str, str]:
        given.update(have_everything(endpoint))
        return given

    with ecs_stack(have) as created:
        yield created


def test_a_stack_in_an_account_that_has_everything(stack: Stack, given: Mapping[str, str]) -> None:
    ec2 = stack.client("ec2")
    # moto's accounts have a default network.
    assert {one["VpcId"] for one in ec2.describe_vpcs()["Vpcs"] if not one["IsDefault"]} == {given["VpcId"]}
    assert ec2.describe_nat_gateways()["NatGateways"] == []
    assert stack.client("rds").describe_db_instances()["DBInstances"] == []
    subnets = set(given["SubnetIds"].split(","))
    for group in stack.client("autoscaling").describe_auto_scaling_groups()["AutoScalingGroups"]:
        assert set(group["VPCZoneIdentifier"].split(",")) == subnets
    (template,) = ec2.describe_launch_templates()["LaunchTemplates"]
    (version,) = ec2.describe_launch_template_versions(LaunchTemplateId=template["LaunchTemplateId"])[
        "LaunchTemplateVersions"
    ]
    data = version["LaunchTemplateData"]
    assert data["SecurityGroupIds"] == given["SecurityGroupIds"].split(",")
    assert data["BlockDeviceMappings"][0]["Ebs"]["KmsKeyId"] == given["KmsKeyArn"]
    outputs = stack.outputs()
    assert outputs["Vpc"] == given["VpcId"]
    assert outputs["PrivateSubnets"] == given["SubnetIds"]
    assert outputs["TaskSecurityGroup"] == given["SecurityGroupIds"]
    assert outputs["DatabaseHost"] == given["DatabaseHost"]
    assert outputs["DatabaseSecret"] == given["DatabaseSecretArn"]


def test_the_service_uses_the_given_network(stack: Stack, given: Mapping[str, str]) -> None:
    """moto's services have no network, so this reads the template."""
    network = stack.template["Resources"]["ControlPlane"]["Properties"]["NetworkConfiguration"]["AwsvpcConfiguration"]
    assert network == {
        "Subnets": given["SubnetIds"].split(","),
        "SecurityGroups": given["SecurityGroupIds"].split(","),
        "AssignPublicIp": "DISABLED",
    }


def test_the_given_key_encrypts_the_buckets(stack: Stack, given: Mapping[str, str]) -> None:
    for name in ("DataBucket", "LogBucket"):
        answer = stack.client("s3").get_bucket_encryption(Bucket=stack.physical[name])
        (rule,) = answer["ServerSideEncryptionConfiguration"]["Rules"]
        default = rule["ApplyServerSideEncryptionByDefault"]
        assert default == {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": given["KmsKeyArn"]}


def test_the_given_key_encrypts_a_database_of_the_stack() -> None:
    resources = made(("network", "key"))["Resources"]
    for name in ("Database", "DatabaseSecret"):
        assert resources[name]["Properties"]["KmsKeyId"] == KEY
        assert "KmsKeyId" not in made(())["Resources"][name]["Properties"]


@pytest.mark.parametrize(
    ("mix", "source"),
    [
        ((), {"Fn::GetAtt": ["TaskSecurityGroup", "GroupId"]}),
        (("network",), {"Fn::GetAtt": ["TaskSecurityGroup", "GroupId"]}),
        (("network", "groups"), EXISTING["SecurityGroupIds"]),
    ],
)
def test_only_tasks_and_nodes_reach_a_database_of_the_stack(mix: tuple[str, ...], source: Any) -> None:
    properties = made(mix)["Resources"]["DatabaseSecurityGroup"]["Properties"]
    (rule,) = properties["SecurityGroupIngress"]
    assert rule["SourceSecurityGroupId"] == source
    assert properties["VpcId"] == (EXISTING["VpcId"] if mix else {"Ref": "Vpc"})
    # Without a rule, AWS would allow everything that goes out.
    assert len(properties["SecurityGroupEgress"]) == 1


@pytest.mark.parametrize("family", ["census-tf-control", "census-tf-worker", "census-tf-control-plane"])
def test_every_container_has_the_given_database(stack: Stack, given: Mapping[str, str], family: str) -> None:
    for container in stack.task(family)["containerDefinitions"]:
        variables = {one["name"]: one["value"] for one in container["environment"]}
        assert {name: variables[f"DAGSTER_PG_{name}"] for name in ("HOST", "PORT", "DB", "USER")} == {
            "HOST": "postgres.example",
            "PORT": "6432",
            "DB": "census",
            "USER": "census_tf",
        }
        assert alert_channel(variables, "CENSUS_TF_ALERTS") == given["AlertTopicArn"]
        arn = f"{given['DatabaseSecretArn']}:password::"
        assert container["secrets"] == [{"name": "DAGSTER_PG_PASSWORD", "valueFrom": arn}]
        assert "DAGSTER_PG_PASSWORD" not in json.dumps(variables)
