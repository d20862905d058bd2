"""moto's server, with the outputs of a stack that a change set creates: `aws cloudformation deploy` makes one.

moto 5.2 computes the outputs before the change set has given the stack its template, and never again.
"""

from typing import Any

from moto.cloudformation.models import CloudFormationBackend
from moto.server import main

_execute = CloudFormationBackend.execute_change_set


def _execute_and_renew_outputs(self: Any, change_set_name: str, stack_name: str | None = None) -> None:
    _execute(self, change_set_name, stack_name)
    for stack in self.stacks.values():
        if stack.template:
            stack._parse_template()
            stack.output_map = stack._create_output_map()


if __name__ == "__main__":
    CloudFormationBackend.execute_change_set = _execute_and_renew_outputs  # type: ignore[method-assign]
    main()
