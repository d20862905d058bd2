"""deploy/ecs/template.yaml in an account that has nothing, and in one that has everything."""

from tests.support.aws_documented import ACCOUNT, REGION
from tests.support.cfn_conditions import applied
from tests.support.ecs_stack import IMAGES, read_template

EXISTING = {
    "VpcId": "vpc-0123456789abcdef0",
    "SubnetIds": "subnet-0123456789abcdef0,subnet-0123456789abcdef1",
    "SecurityGroupIds": "sg-0123456789abcdef0",
    "KmsKeyArn": f"arn:aws:kms:{REGION}:{ACCOUNT}:key/1234abcd-12ab-34cd-56ef-1234567890ab",
    "AlertTopicArn": f"arn:aws:sns:{REGION}:{ACCOUNT}:alerts",
    "DatabaseHost": "postgres.example",
    "DatabaseSecretArn": f"arn:aws:secretsmanager:{REGION}:{ACCOUNT}:secret:team/dagster-a1b2c3",
}
"""Parameters of a stack in an account that has everything."""
VARIANTS = {"": applied(read_template(), **IMAGES), "existing ": applied(read_template(), **IMAGES, **EXISTING)}
"""The template as it is applied in both."""
