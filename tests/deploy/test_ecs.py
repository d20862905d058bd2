"""deploy/ecs/template.yaml: cfn-lint, the stack as far as moto supports it, and the permissions of each role."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import boto3
import pytest
import yaml
from botocore.exceptions import ClientError

from census_tf_dagster.config.placement import read_placement
from census_tf_dagster.definitions import load_settings
from tests.support.builders import tiny
from tests.support.ecs_deployment import write_dagster_yaml
from tests.support.ecs_stack import IMAGES, NAME, NOT_IN_MOTO, TEMPLATE, Stack, ecs_stack, read_template
from tests.support.iam_policies import allowed
from tests.support.launching import launch
from tests.support.moto_servers import REGION
from tests.support.on_s3 import reader_config
from tests.support.postgres import postgres
from tests.support.project import RELEASE, REPOSITORY, Project, read_array

pytestmark = pytest.mark.takes(50)

SETS, PLACEMENT = REPOSITORY / "deploy" / "sets", REPOSITORY / "deploy" / "ecs"
ACCOUNT = "123456789012"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with ecs_stack() as made:
        yield made


def test_cfn_lint_finds_nothing() -> None:
    command = [str(Path(sys.executable).with_name("cfn-lint")), "-r", "us-west-2", "us-east-1", "-t", str(TEMPLATE)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_moto_makes_all_but_what_it_is_known_to_leave_out(stack: Stack) -> None:
    left_out = {one["Type"] for name, one in stack.template["Resources"].items() if not stack.physical.get(name)} - {
        "AWS::RDS::DBSubnetGroup"
    }
    assert left_out == NOT_IN_MOTO.keys()
    # moto makes this one and forgets its name.
    assert len(stack.client("rds").describe_db_subnet_groups()["DBSubnetGroups"]) == 1


def test_nothing_can_be_reached_from_outside(stack: Stack) -> None:
    kinds = {one["Type"] for one in stack.template["Resources"].values()}
    assert not [kind for kind in kinds if "LoadBalanc" in kind]
    ec2 = stack.client("ec2")
    ids = [stack.physical[name] for name in stack.of_type("AWS::EC2::SecurityGroup")]
    groups = {one["GroupId"]: one for one in ec2.describe_security_groups(GroupIds=ids)["SecurityGroups"]}
    tasks, database = (groups[stack.physical[name]] for name in ("TaskSecurityGroup", "DatabaseSecurityGroup"))
    assert tasks["IpPermissions"] == []
    (rule,) = database["IpPermissions"]
    assert (rule["FromPort"], rule["ToPort"], rule["IpRanges"]) == (5432, 5432, [])
    assert [pair["GroupId"] for pair in rule["UserIdGroupPairs"]] == [tasks["GroupId"]]
    # moto's services have no network.
    network = stack.template["Resources"]["ControlPlane"]["Properties"]["NetworkConfiguration"]["AwsvpcConfiguration"]
    assert network["AssignPublicIp"] == "DISABLED"
    assert network["SecurityGroups"] == [{"Fn::GetAtt": ["TaskSecurityGroup", "GroupId"]}]
    private = {stack.physical[f"PrivateSubnet{letter}"] for letter in "ABC"}
    assert {stack.physical[one["Ref"]] for one in network["Subnets"]} == private
    for group in stack.client("autoscaling").describe_auto_scaling_groups()["AutoScalingGroups"]:
        assert set(group["VPCZoneIdentifier"].split(",")) == private
    (gateway,) = ec2.describe_nat_gateways()["NatGateways"]
    assert gateway["SubnetId"] not in private
    for table in ec2.describe_route_tables()["RouteTables"]:
        of_private = private & {one.get("SubnetId") for one in table["Associations"]}
        out = [route for route in table["Routes"] if route.get("DestinationCidrBlock") == "0.0.0.0/0"]
        assert not of_private or [route.get("NatGatewayId") for route in out] == [gateway["NatGatewayId"]]


def test_one_type_of_gpu_nodes_is_enough() -> None:
    with ecs_stack(GpuInstanceTypes="g6e.2xlarge") as made:
        for group in made.client("autoscaling").describe_auto_scaling_groups()["AutoScalingGroups"]:
            overrides = group["MixedInstancesPolicy"]["LaunchTemplate"]["Overrides"]
            assert [one["InstanceType"] for one in overrides] == ["g6e.2xlarge"]


def test_outputs_name_what_a_person_needs(stack: Stack) -> None:
    outputs = stack.outputs()
    assert outputs["Cluster"] == NAME
    for bucket in ("DataBucket", "LogBucket"):
        assert outputs[bucket] == stack.physical[bucket]
    for logs in ("RunLogs", "ControlLogs"):
        assert stack.client("logs").describe_log_groups(logGroupNamePrefix=outputs[logs])["logGroups"]
    services = stack.client("ecs").describe_services(cluster=NAME, services=[outputs["ControlPlaneService"]])
    assert len(services["services"]) == 1
    for family in ("ControlTaskFamily", "WorkerTaskFamily"):
        assert stack.task(outputs[family])["family"] == outputs[family]
    assert outputs["DatabaseSecret"] == stack.secret
    subnets = [stack.physical[f"PrivateSubnet{letter}"] for letter in "ABC"]
    assert outputs["PrivateSubnets"].split(",") == subnets
    assert outputs["TaskSecurityGroup"] == stack.physical["TaskSecurityGroup"]
    assert (outputs["ControlRole"], outputs["RunRole"]) == (stack.role("ControlRole"), stack.role("RunRole"))


def test_the_database(stack: Stack) -> None:
    (database,) = stack.client("rds").describe_db_instances()["DBInstances"]
    assert not database["PubliclyAccessible"]
    assert database["StorageEncrypted"]
    assert database["BackupRetentionPeriod"] == 7
    properties = stack.template["Resources"]["Database"]
    assert properties["DeletionPolicy"] == "Snapshot"
    # By name only: the password is nowhere in the template.
    assert properties["Properties"]["MasterUserPassword"]["Fn::Sub"].startswith("{{resolve:secretsmanager:${Database")


def test_buckets_and_logs(stack: Stack) -> None:
    s3 = stack.client("s3")
    for name in ("DataBucket", "LogBucket"):
        bucket = stack.physical[name]
        # moto's CloudFormation does not hand on this and the lifecycle.
        properties = stack.template["Resources"][name]["Properties"]
        blocked = properties["PublicAccessBlockConfiguration"]
        assert len(blocked) == 4
        assert all(blocked.values())
        assert s3.get_bucket_encryption(Bucket=bucket)["ServerSideEncryptionConfiguration"]["Rules"]
        rules = properties["LifecycleConfiguration"]["Rules"]
        assert [rule["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] for rule in rules] == [7]
        # Arrays never expire.
        assert [any("Expiration" in key for key in rule) for rule in rules] == [name == "LogBucket"]
        assert stack.template["Resources"][name]["DeletionPolicy"] == "Retain"
    for group in stack.client("logs").describe_log_groups()["logGroups"]:
        assert group["retentionInDays"] == 30


def test_gpu_nodes_come_from_nothing(stack: Stack) -> None:
    spot = {}
    for group in stack.client("autoscaling").describe_auto_scaling_groups()["AutoScalingGroups"]:
        assert (group["MinSize"], group["DesiredCapacity"], group["MaxSize"]) == (0, 0, 32)
        policy = group["MixedInstancesPolicy"]
        types = [one["InstanceType"] for one in policy["LaunchTemplate"]["Overrides"]]
        assert types == ["g6e.xlarge", "g6e.2xlarge", "g6.2xlarge", "g5.2xlarge"]
        spot[group["AutoScalingGroupARN"]] = policy["InstancesDistribution"]["OnDemandPercentageAboveBaseCapacity"] == 0
        # ECS takes idle nodes away, and only those.
        assert group["NewInstancesProtectedFromScaleIn"]
    ours = {one["name"]: one["autoScalingGroupProvider"] for one in stack.capacity_providers()}
    assert {name: spot[one["autoScalingGroupArn"]] for name, one in ours.items()} == {
        "census-tf-gpu-spot": True,
        "census-tf-gpu-on-demand": False,
    }
    assert {one["managedScaling"]["status"] for one in ours.values()} == {"ENABLED"}
    (launched,) = stack.of_type("AWS::EC2::LaunchTemplate").values()
    data = launched["Properties"]["LaunchTemplateData"]
    # A container is one hop further than the node: it does not get the node's role.
    assert data["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}
    assert stack.template["Parameters"]["GpuAmi"]["Default"].startswith("/aws/service/ecs/optimized-ami/")
    assert stack.template["Parameters"]["GpuAmi"]["Type"].startswith("AWS::SSM::Parameter::Value")


def variables_of_dagster_yaml() -> set[str]:
    found: set[str] = set()

    def look(part: Any) -> None:
        if isinstance(part, dict):
            found.update({part["env"]} if part.keys() == {"env"} else ())
            for one in part.values():
                look(one)

    look(yaml.safe_load((REPOSITORY / "deploy" / "ecs" / "dagster.yaml").read_text()))
    return found


@pytest.mark.parametrize(
    ("family", "containers", "role", "image"),
    [
        ("census-tf-control", ["run"], "RunRole", "ControlImage"),
        ("census-tf-worker", ["run"], "RunRole", "WorkerImage"),
        ("census-tf-control-plane", ["code", "webserver", "daemon"], "ControlRole", "ControlImage"),
    ],
    ids=["control", "worker", "plane"],
)
def test_task_definitions(stack: Stack, family: str, containers: list[str], role: str, image: str) -> None:
    task = stack.task(family)
    assert [one["name"] for one in task["containerDefinitions"]] == containers
    # moto's answer lacks the roles.
    properties = next(
        one["Properties"]
        for one in stack.of_type("AWS::ECS::TaskDefinition").values()
        if one["Properties"]["Family"]["Fn::Sub"].replace("${AWS::StackName}", NAME) == family
    )
    assert properties["TaskRoleArn"] == {"Fn::GetAtt": [role, "Arn"]}
    assert properties["ExecutionRoleArn"] == {"Fn::GetAtt": ["ExecutionRole", "Arn"]}
    for container in task["containerDefinitions"]:
        assert container["image"] == IMAGES[image]
        given = {one["name"]: one["value"] for one in container["environment"]}
        assert container["secrets"] == [{"name": "DAGSTER_PG_PASSWORD", "valueFrom": f"{stack.secret}:password::"}]
        assert variables_of_dagster_yaml() <= given.keys() | {"DAGSTER_PG_PASSWORD"}
        assert given == stack.environment("census-tf-control", "run")
        assert container["logConfiguration"]["options"]["awslogs-group"] in (f"/{NAME}/runs", f"/{NAME}/control-plane")


def test_there_is_one_daemon(stack: Stack) -> None:
    (service,) = stack.of_type("AWS::ECS::Service").values()
    assert service["Properties"]["DesiredCount"] == 1
    # An update ends the old daemon before it starts the new one.
    assert service["Properties"]["DeploymentConfiguration"]["MaximumPercent"] == 100


def test_the_sets_go_with_the_template(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    placement = read_placement(PLACEMENT)
    assert placement is not None
    assert placement.ecs is not None
    known = {one["name"] for one in stack.capacity_providers()}
    assert set(placement.ecs.capacity_providers.values()) == known
    assert stack.task(placement.ecs.task_definition)["family"] == "census-tf-worker"
    for name, value in stack.environment("census-tf-worker", "run").items():
        monkeypatch.setenv(name, value)
    checkpoints = {one.checkpoint for one in load_settings(SETS).values()}
    assert all(one.startswith(f"s3://{stack.physical['DataBucket']}/checkpoints/") for one in checkpoints)


@pytest.fixture
def launched(stack: Stack, project: Project) -> dict[str, Any]:
    """The RunTask of a shard that was launched with deploy/ecs/dagster.yaml and the stack's own variables."""
    project.add_set("tiny", organism="homo_sapiens", device="cuda")
    (project.folder / "sets" / "placement.yaml").write_text((PLACEMENT / "placement.yaml").read_text())
    write_dagster_yaml(project.folder / "dagster_home")
    ecs, ec2 = stack.client("ecs"), stack.client("ec2")
    image = ec2.describe_images()["Images"][0]["ImageId"]
    (node,) = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="g6e.xlarge")["Instances"]
    document = json.dumps({"instanceId": node["InstanceId"]})
    ecs.register_container_instance(cluster=NAME, instanceIdentityDocument=document)
    # moto's nodes have room for a task of this size only, and it looks at the container's own memory.
    for family in ("census-tf-worker", "census-tf-control"):
        small = [{"name": "run", "image": "registry.example/image", "memory": 16}]
        ecs.register_task_definition(family=family, containerDefinitions=small)
    with postgres() as database:
        given = stack.environment("census-tf-control-plane", "daemon") | database
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_ENDPOINT_URL": stack.endpoint}
        with mock.patch.dict(os.environ, given | keys):
            launch(project, "shard_embeddings")
    (arn,) = ecs.list_tasks(cluster=NAME)["taskArns"]
    (task,) = ecs.describe_tasks(cluster=NAME, tasks=[arn])["tasks"]
    return task


def test_a_shard_s_task_is_the_stack_s_worker(launched: dict[str, Any]) -> None:
    assert launched["taskDefinitionArn"].endswith("/census-tf-worker:2")
    assert launched["capacityProviderName"] == "census-tf-gpu-spot"
    (container,) = launched["overrides"]["containerOverrides"]
    assert container["resourceRequirements"] == [{"type": "GPU", "value": "1"}]


# What the roles may do. `True` where it must work, `False` where it must not.

S3_RULES: dict[str, list[tuple[str, str, str, bool]]] = {
    "RunRole": [
        ("GetObject", "DataBucket", "checkpoints/m/config.json", True),
        ("GetObject", "DataBucket", "sets/s/defs.yaml", True),
        ("GetObject", "DataBucket", "store/s/x", True),
        ("PutObject", "DataBucket", "store/s/x", True),
        ("DeleteObject", "DataBucket", "store/s/x", True),
        ("ListBucket", "DataBucket", "", True),
        ("PutObject", "DataBucket", "checkpoints/m/config.json", False),
        ("DeleteObject", "DataBucket", "checkpoints/m/config.json", False),
        ("PutObject", "DataBucket", "sets/s/defs.yaml", False),
        ("PutObject", "DataBucket", "store-of-others/x", False),
        ("PutObject", "DataBucket", "other/x", False),
        ("GetObject", "DataBucket", "other/x", False),
        ("PutObject", "LogBucket", "dagster/storage/r/x.out", True),
        ("GetObject", "LogBucket", "dagster/storage/r/x.out", False),
        ("DeleteObject", "LogBucket", "dagster/storage/r/x.out", False),
        ("PutObject", "LogBucket", "other/x", False),
        ("PutObject", "elsewhere", "store/x", False),
        ("GetObject", "elsewhere", "store/x", False),
        ("ListBucket", "elsewhere", "", False),
    ],
    "ControlRole": [
        ("GetObject", "DataBucket", "store/s/x", True),
        ("GetObject", "DataBucket", "sets/s/defs.yaml", True),
        ("ListBucket", "DataBucket", "", True),
        ("PutObject", "DataBucket", "store/s/x", False),
        ("DeleteObject", "DataBucket", "store/s/x", False),
        ("PutObject", "DataBucket", "sets/s/defs.yaml", False),
        ("GetObject", "LogBucket", "dagster/storage/r/x.out", True),
        ("DeleteObject", "LogBucket", "dagster/storage/r/x.out", False),
        ("GetObject", "elsewhere", "store/x", False),
    ],
    "ExecutionRole": [
        ("GetObject", "DataBucket", "store/s/x", False),
        ("PutObject", "DataBucket", "store/s/x", False),
        ("ListBucket", "DataBucket", "", False),
    ],
}


@pytest.fixture(scope="module")
def enforced() -> Iterator[Stack]:
    """A stack with objects to read, whose server refuses every request that the sender's role does not allow."""
    with ecs_stack() as made:
        made.client("s3").create_bucket(Bucket="elsewhere")
        yield made


@pytest.mark.parametrize("role", S3_RULES)
def test_what_a_role_may_do_on_s3(enforced: Stack, role: str) -> None:
    enforced.enforce(on=False)
    for _, bucket, key, _ in S3_RULES[role]:
        if key:
            enforced.client("s3").put_object(Bucket=enforced.physical.get(bucket, bucket), Key=key, Body=b"there")
    documents = enforced.policies(role)
    keys = {name.lower(): value for name, value in enforced.credentials(role).items()}
    s3 = boto3.client("s3", endpoint_url=enforced.endpoint, region_name=REGION, **keys)
    enforced.enforce(on=True)
    calls = {
        "GetObject": lambda bucket, key: s3.get_object(Bucket=bucket, Key=key),
        "PutObject": lambda bucket, key: s3.put_object(Bucket=bucket, Key=key, Body=b"new"),
        "DeleteObject": lambda bucket, key: s3.delete_object(Bucket=bucket, Key=key),
        "ListBucket": lambda bucket, _: s3.list_objects_v2(Bucket=bucket),
    }
    for action, name, key, wanted in S3_RULES[role]:
        bucket = enforced.physical.get(name, name)
        arn = f"arn:aws:s3:::{bucket}" + (f"/{key}" if key else "")
        assert allowed(documents, f"s3:{action}", arn) is wanted, (role, action, name, key)
        if wanted:
            calls[action](bucket, key)
        else:
            with pytest.raises(ClientError) as refused:
                calls[action](bucket, key)
            assert refused.value.response["Error"]["Code"] in ("AccessDenied", "403"), (role, action, name, key)


def test_the_runs_role_is_enough_for_a_release(enforced: Stack, project: Project) -> None:
    enforced.enforce(on=False)
    # AWS asks for s3:ListBucket where moto has an action of its own.
    head = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:HeadBucket", "Resource": "*"}]}
    role = enforced.physical["RunRole"]
    enforced.client("iam").put_role_policy(RoleName=role, PolicyName="moto", PolicyDocument=json.dumps(head))
    tiny(project, cells=60, shards=2)
    bucket = enforced.physical["DataBucket"]
    given = enforced.environment("census-tf-worker", "run")
    project.env |= {
        "CENSUS_TF_STORE": given["CENSUS_TF_STORE"],
        "CENSUS_TF_STORE_S3_REGION": REGION,
        "CENSUS_TF_STORE_S3_ENDPOINT": enforced.endpoint,
        **enforced.credentials("RunRole"),
    }
    logs = {"bucket": given["CENSUS_TF_LOG_BUCKET"], "prefix": "dagster", "endpoint_url": enforced.endpoint}
    home = {"compute_logs": {"module": "dagster_aws.s3", "class": "S3ComputeLogManager", "config": logs}}
    (project.folder / "dagster_home" / "dagster.yaml").write_text(yaml.safe_dump(home))
    enforced.enforce(on=True)
    assert project.command("release", "add", RELEASE).returncode == 0
    project.materialize_all("tiny", shards=2)
    enforced.enforce(on=False)
    printed = enforced.client("s3").list_objects_v2(Bucket=logs["bucket"], Prefix="dagster/storage/")["Contents"]
    assert {one["Key"].rpartition(".")[2] for one in printed} >= {"err", "out"}
    (array,) = {
        one["Key"].partition("/embeddings/")[0]
        for one in enforced.client("s3").list_objects_v2(Bucket=bucket, Prefix="store/tiny/")["Contents"]
        if "/embeddings/" in one["Key"]
    }
    with mock.patch.dict(os.environ, {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}):
        stored = read_array(f"s3://{bucket}/{array}/embeddings", project.folder, reader_config(enforced.endpoint))
    assert stored.ids.tolist() == list(range(60))


SECRET_OF_OTHERS = f"arn:aws:secretsmanager:{REGION}:{ACCOUNT}:secret:other-1"


def test_only_the_execution_role_reads_a_secret_and_only_one(stack: Stack) -> None:
    read = "secretsmanager:GetSecretValue"
    assert allowed(stack.policies("ExecutionRole"), read, stack.secret)
    assert not allowed(stack.policies("ExecutionRole"), read, SECRET_OF_OTHERS)
    for role in ("ControlRole", "RunRole"):
        assert not allowed(stack.policies(role), read, stack.secret)
        assert not allowed(stack.policies(role), read, SECRET_OF_OTHERS)
    for role in ("ExecutionRole", "ControlRole", "RunRole"):
        for action in (
            "secretsmanager:PutSecretValue",
            "secretsmanager:ListSecrets",
            "ssm:GetParameter",
            "kms:Decrypt",
        ):
            assert not allowed(stack.policies(role), action, stack.secret), (role, action)


def test_the_control_plane_launches_its_two_tasks_as_two_roles_and_nothing_else(stack: Stack) -> None:
    documents = stack.policies("ControlRole")
    arn = f"arn:aws:ecs:{REGION}:{ACCOUNT}"
    here, there = {"ecs__cluster": f"{arn}:cluster/{NAME}"}, {"ecs__cluster": f"{arn}:cluster/other"}
    for family, wanted in (("census-tf-worker", True), ("census-tf-control", True), ("census-tf-control-plane", False)):
        assert allowed(documents, "ecs:RunTask", f"{arn}:task-definition/{family}:3", **here) is wanted, family
        assert not allowed(documents, "ecs:RunTask", f"{arn}:task-definition/{family}:3", **there)
    for action in ("ecs:StopTask", "ecs:DescribeTasks"):
        assert allowed(documents, action, f"{arn}:task/{NAME}/1")
        assert not allowed(documents, action, f"{arn}:task/other/1")
    assert allowed(documents, "ecs:TagResource", f"{arn}:task/{NAME}/1", ecs__CreateAction="RunTask")
    assert not allowed(documents, "ecs:TagResource", f"{arn}:task/{NAME}/1")
    to = {"iam__PassedToService": "ecs-tasks.amazonaws.com"}
    passed = {
        name for name in stack.of_type("AWS::IAM::Role") if allowed(documents, "iam:PassRole", stack.role(name), **to)
    }
    assert passed == {"RunRole", "ExecutionRole"}
    assert not allowed(documents, "iam:PassRole", stack.role("RunRole"), iam__PassedToService="ec2.amazonaws.com")
    assert not allowed(documents, "iam:PassRole", f"arn:aws:iam::{ACCOUNT}:role/admin", **to)
    for action in ("ecs:RegisterTaskDefinition", "ecs:UpdateService", "iam:CreateRole", "iam:PutRolePolicy"):
        assert not allowed(documents, action, "*")


def test_what_the_launcher_asks_of_aws_is_allowed(stack: Stack) -> None:
    """Each call in dagster_aws's launcher that deploy/ecs/dagster.yaml leads to."""
    arn = f"arn:aws:ecs:{REGION}:{ACCOUNT}"
    for role in ("ControlRole", "RunRole"):
        assert allowed(stack.policies(role), "ecs:DescribeTaskDefinition", f"{arn}:task-definition/census-tf-control:1")
    assert allowed(stack.policies("ControlRole"), "ec2:DescribeNetworkInterfaces", "*")
    # test_ecs_documented.py has the logs, because moto's ARN of a log group is not AWS's.
    assert not allowed(stack.policies("RunRole"), "ecs:RunTask", f"{arn}:task-definition/census-tf-worker:1")


def test_only_ecs_may_take_the_roles_of_tasks() -> None:
    for name in ("ExecutionRole", "ControlRole", "RunRole"):
        trusted = read_template()["Resources"][name]["Properties"]["AssumeRolePolicyDocument"]["Statement"]
        assert [one["Principal"] for one in trusted] == [{"Service": "ecs-tasks.amazonaws.com"}]
        assert trusted[0]["Condition"] == {"StringEquals": {"aws:SourceAccount": {"Ref": "AWS::AccountId"}}}


def test_buckets_refuse_plain_connections() -> None:
    for name in ("DataBucket", "LogBucket"):
        (statement,) = read_template()["Resources"][f"{name}Policy"]["Properties"]["PolicyDocument"]["Statement"]
        document = {"Statement": [statement | {"Resource": "*"}, {"Effect": "Allow", "Action": "*", "Resource": "*"}]}
        assert not allowed([document], "s3:GetObject", "x", aws__SecureTransport="false")
        assert allowed([document], "s3:GetObject", "x", aws__SecureTransport="true")
