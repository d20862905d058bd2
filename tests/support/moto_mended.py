"""moto's server, with two things of CloudFormation as AWS has them.

- The outputs of a stack that a change set creates: `aws cloudformation deploy` makes one. moto 5.2 computes the outputs
  before the change set has given the stack its template, and never again.
- AWS::NoValue in a list: AWS leaves such an item out, and moto 5.2 keeps it as None.
"""

from typing import Any

from moto.cloudformation import parsing
from moto.cloudformation.models import CloudFormationBackend
from moto.server import main

_execute = CloudFormationBackend.execute_change_set
_clean = parsing.clean_json


def _execute_and_renew_outputs(self: Any, change_set_name: str, stack_name: str | None = None) -> None:
    _execute(self, change_set_name, stack_name)
    for stack in self.stacks.values():
        if stack.template:
            stack._parse_template()
            stack.output_map = stack._create_output_map()


def _clean_and_leave_out(resource_json: Any, resources_map: Any) -> Any:
    found = _clean(resource_json, resources_map)
    return [one for one in found if one is not None] if isinstance(resource_json, list) else found


if __name__ == "__main__":
    CloudFormationBackend.execute_change_set = _execute_and_renew_outputs  # type: ignore[method-assign]
    parsing.clean_json = _clean_and_leave_out
    main()
