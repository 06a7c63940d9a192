from pathlib import Path

from lines_cli.plan.adapter_inputs import AdapterInputs
from lines_cli.plan.adapter_plan import AdapterPlan


def plan_of_extraction(opened: AdapterInputs, output: Path) -> AdapterPlan:
    raise NotImplementedError
