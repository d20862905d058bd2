"""Every mistake that a set's YAML can have: file, line, value and remedy, on loading and by `check`."""

import json
import re
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from types import ModuleType

import dagster as dg
import pytest
import yaml
from dagster.components.core.component_tree import ComponentTreeException

from census_tf_dagster.definitions import load_sets, load_settings
from census_tf_dagster.embedding_set import EmbeddingSet
from census_tf_dagster.errors import UserError
from census_tf_dagster.placement import read_placement
from census_tf_dagster.retention import read_retention
from tests.support import REPOSITORY, Project

GOOD = """\
type: census_tf_dagster.embedding_set.EmbeddingSet
attributes:
  name: one
  organism: homo_sapiens
  checkpoint: /models/tf_sapiens
"""
PUBLICATION = """\
  publication:
    id: CxG-contrib-1
    embedding_name: tf
    title: A title
    description: A text
    primary_contact:
      name: Ada
      email: ada@example.org
      affiliation: Engines
"""
GPU = "  placement:\n    ecs:\n      task_definition: w\n      capacity_providers: {on_demand: gpu}\n"

# What is written to one/defs.yaml, the line of the mistake, the value shown, the remedy.
CASES = {
    "unknown field": (GOOD + "  shard: 4\n", 6, "attributes.shard is unknown", "Did you mean shards?"),
    "unknown field, far": (GOOD + "  colour: red\n", 6, "attributes.colour is unknown", "Known are: name, organism"),
    "wrong type": (GOOD + "  shards: four\n", 6, "attributes.shards is 'four'", "a valid integer"),
    "null": (GOOD + "  shards:\n", 6, "attributes.shards is None", "a valid integer"),
    "text where a list stands": (GOOD + "  pretrained_embeddings: a.h5\n", 6, "'a.h5'", "a valid list"),
    "wrong item": (GOOD + "  pretrained_embeddings:\n  - a.h5\n  - 7\n", 8, "is 7", "a valid string"),
    "too small": (GOOD + "  shards: 0\n", 6, "attributes.shards is 0", "greater than or equal to 1"),
    "too large": (GOOD + "  shards: 10000\n", 6, "attributes.shards is 10000", "less than or equal to 9999"),
    "no choice": (GOOD + "  device: tpu\n", 6, "attributes.device is 'tpu'", "'cuda' or 'cpu'"),
    "precision": (GOOD + "  compute_precision: fp8\n", 6, "'fp8'", "'fp32', 'fp16' or 'bf16'"),
    "name": (GOOD.replace("one", "../one"), 3, "attributes.name is '../one'", "letters, digits and _"),
    "empty checkpoint": (GOOD.replace("/models/tf_sapiens", '""'), 5, "attributes.checkpoint is ''", "at least 1"),
    "missing": (GOOD.replace("  organism: homo_sapiens\n", ""), 3, "attributes.organism is missing", "Key of the"),
    "given twice": (GOOD + "  shards: 4\n  shards: 5\n", 7, "attributes.shards is given twice", "Keep one"),
    "contact": (
        GOOD + PUBLICATION.replace("ada@", "ada at "),
        13,
        "'ada at example.org'",
        "An address such as",
    ),
    "title": (GOOD + PUBLICATION.replace("A title", "x" * 200), 9, "title is 'xxx", "at most 127"),
    "DOI": (GOOD + PUBLICATION + "    DOI: https://doi.org/10.1/x\n", 15, "'https://doi.org/10.1/x'", "not a URL"),
    "date": (GOOD + PUBLICATION + "    submission_date: soon\n", 15, "'soon'", "YYYY-MM-DD"),
    "link": (GOOD + PUBLICATION + "    model_link: here\n", 15, "'here'", "URL"),
    "publication field": (GOOD + PUBLICATION + "    doi: 10.1/x\n", 15, "publication.doi is unknown", "mean DOI?"),
    "publication part": (GOOD + "  publication:\n    id: x\n", 7, "publication.title is missing", "Add it."),
    "placement field": (GOOD + "  placement:\n    gpu: 1\n", 7, "placement.gpu is unknown", "Did you mean gpus?"),
    "placement value": (GOOD + "  placement:\n    gpus: many\n", 7, "gpus is 'many'", "a valid integer"),
    "purchase": (GOOD + GPU + "    purchase: spot\n", 7, "purchase is spot", "Change or add it"),
    "disk": (GOOD + GPU + "    disk_gib: 100\n", 7, "disk_gib is 100 and ecs.disk is missing", "Change or add it"),
    "filter": (
        GOOD + "  value_filter: tissue = 'lung'\n",
        6,
        "tissue = 'lung'",
        "expected such as: is_primary_data ==",
    ),
    "filter, no test": (GOOD + "  value_filter: tissue\n", 6, "'tissue' compares nothing", "expected such as"),
    "template variable": (
        GOOD + "  value_filter: '{{ env.NO_SUCH }}'\n",
        6,
        "{{ env.NO_SUCH }}",
        "variable NO_SUCH is not set. Set it where Dagster",
    ),
    "template in a text": (
        GOOD.replace("/models", "x{{ env.NO_SUCH }}"),
        5,
        "{{ env.NO_SUCH }}",
        "variable NO_SUCH is not set. Set it where Dagster",
    ),
    "template syntax": (GOOD + "  value_filter: '{{ env.X'\n", 6, "'{{ env.X'", "Close each {{ with }}"),
    "YAML": (GOOD + "  shards: [4\n", 6, "this is no YAML", "close what was opened"),
    "tab": (GOOD + "\tshards: 4\n", 6, "this is no YAML", "Indent with spaces"),
    "impossible date": (GOOD + "  mod: 2025-13-45\n", 1, "cannot be read: month must be in 1..12", "in quotes"),
    "empty": ("", 1, "the file is empty", "docs/configure.md"),
    "a text": ("hello\n", 1, "the file is 'hello'", "a mapping with `type:"),
    "type": (GOOD.replace(".EmbeddingSet", ".EmbedingSet"), 1, "EmbedingSet'", "Write `type: census_tf_dagster."),
    "no type": (GOOD.split("\n", 1)[1], 1, "type is missing", "Write `type: census_tf_dagster."),
    "no attributes": (GOOD.split("attr")[0], 1, "attributes is missing", "at least name, organism, checkpoint"),
    "not indented": (GOOD + "shards: 4\n", 6, "shards is unknown at the top", "Indent it below attributes."),
    "top": (GOOD + "atributes: 4\n", 6, "atributes is unknown at the top", "Did you mean attributes?"),
}


def write(folder: Path, text: str, name: str = "one/defs.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_sets(folder)
    return str(caught.value)


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_told_with_file_line_value_and_remedy(tmp_path: Path, case: str) -> None:
    text, line, value, remedy = CASES[case]
    path = write(tmp_path, text)
    told = [one for one in refusal(tmp_path).splitlines() if one.startswith(f"  {path}:{line}: ")]
    assert any(value in one and remedy in one for one in told), refusal(tmp_path)


def test_the_examples_are_right_but_for_their_mistake(tmp_path: Path) -> None:
    write(tmp_path, GOOD + PUBLICATION + GPU)
    assert load_sets(tmp_path).assets


def test_two_sets_of_one_name(tmp_path: Path) -> None:
    first, second = write(tmp_path, GOOD), write(tmp_path, GOOD, "two/defs.yaml")
    told = refusal(tmp_path)
    assert f"{second}:3: attributes.name is 'one', which is the name of the set in {first}:3, too" in told
    assert "another name" in told


@pytest.mark.parametrize("name", ["one/set.yaml", "one/defs.yml", "one.yaml"])
def test_a_file_of_another_name(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, GOOD, name)
    assert f"{path}:1: a set in a file named {path.name} is not loaded. Name it {tmp_path}/one/defs.yaml." in refusal(
        tmp_path
    )


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    write(tmp_path, GOOD + "  shard: 4\n  mod: 0\n")
    write(tmp_path, GOOD.replace("one", "two") + "  device: tpu\n", "two/defs.yaml")
    assert "have 3 mistakes:" in refusal(tmp_path)


def test_placement_of_the_deployment(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    path = write(tmp_path, "gpus: 1\npurchas: spot\n", "placement.yaml")
    assert f"{path}:2: purchas is unknown. Did you mean purchase?" in refusal(tmp_path)


def test_no_folder_and_no_sets(tmp_path: Path) -> None:
    assert "CENSUS_TF_SETS names the folder" in refusal(tmp_path / "none")
    assert f"no sets in {tmp_path}: expected files such as {tmp_path}/human_tf_sapiens/defs.yaml" in refusal(tmp_path)


def test_values_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELS", "/models")
    write(tmp_path, GOOD.replace("/models/tf_sapiens", "'{{ env.MODELS }}/tf_sapiens'"))
    assert load_sets(tmp_path).assets


def test_check_says_the_same_and_in_json(project: Project) -> None:
    path = write(project.folder / "sets", GOOD + "  shard: 4\n")
    done = project.command("check")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{path}:6: attributes.shard is unknown. Did you mean shards?" in done.stderr
    found = project.command("check", str(project.folder / "sets"), "--json")
    assert found.returncode == 1
    (problem,) = json.loads(found.stdout)["problems"]
    assert problem == {
        "file": str(path),
        "line": 6,
        "what": "attributes.shard is unknown",
        "remedy": "Did you mean shards?",
    }
    path.write_text(GOOD)
    right = project.command("check")
    assert (right.returncode, right.stderr) == (0, "")
    assert "1 set" in right.stdout


def test_dagsters_own_loading_shows_it(project: Project) -> None:
    path = write(project.folder / "sets", GOOD + "  shard: 4\n")
    command = [sys.executable, "-m", "dagster", "definitions", "validate", "-m", "census_tf_dagster.definitions"]
    done = subprocess.run(command, cwd=project.folder, env=project.env, capture_output=True, text=True)
    assert done.returncode != 0
    assert re.search(
        rf"UserError: the sets in .* have a mistake:\s+{re.escape(str(path))}:6: ", done.stdout + done.stderr
    )


def test_the_sets_of_the_package_are_right() -> None:
    assert load_sets(REPOSITORY / "census_tf_dagster" / "defs").assets


class Canary:
    """Code that whoever writes a set's file might want to run, and how to see that it did."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "canary"
        command = f"touch {self.file}"
        self.templates = {
            "globals": "{{ cycler.__init__.__globals__.os.system('" + command + "') }}",
            "statement": "{% if cycler.__init__.__globals__.os.system('" + command + "') %}{% endif %}",
            "behind a variable": "{{ env.HOME }}{{ lipsum.__globals__.os.system('" + command + "') }}",
            "of env": "{{ env.__class__.__init__.__globals__.os.system('" + command + "') }}",
        }


@pytest.fixture
def canary(tmp_path_factory: pytest.TempPathFactory) -> Canary:
    return Canary(tmp_path_factory.mktemp("canary"))


KINDS_OF_TEMPLATE = ("globals", "statement", "behind a variable", "of env")


def refusal_of_dagster(folder: Path) -> str:
    """Load a folder as a Dagster project does that knows the component and not this package's own checks."""
    package = ModuleType("sets_of_another_project")
    package.__file__, package.__path__ = None, [str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, package.__name__, package)
        warnings.simplefilter("ignore", dg.BetaWarning)
        warnings.simplefilter("ignore", dg.PreviewWarning)
        with pytest.raises(ComponentTreeException) as caught:
            dg.ComponentTree.from_module(package, project_root=folder).build_defs()
    return "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("kind", KINDS_OF_TEMPLATE)
@pytest.mark.parametrize("field", ["value_filter", "checkpoint", "title", "owners"])
def test_a_template_runs_no_code(tmp_path: Path, canary: Canary, kind: str, field: str) -> None:
    document = yaml.safe_load(GOOD + PUBLICATION)
    attributes, template = document["attributes"], canary.templates[kind]
    if field == "title":
        attributes["publication"]["title"] = template
    else:
        attributes[field] = [template] if field == "owners" else template
    write(tmp_path, yaml.safe_dump(document))
    (told,) = refusal(tmp_path).splitlines()[1:]
    assert "{{ env.NAME }} is the only template that is understood" in told
    assert "only template that is understood" in refusal_of_dagster(tmp_path)
    assert not canary.file.exists()


@pytest.mark.parametrize("name", ["placement.yaml", "retention.yaml"])
def test_a_template_of_the_deployment_runs_no_code(tmp_path: Path, canary: Canary, name: str) -> None:
    write(tmp_path, GOOD)
    entry = "gpu_type" if name == "placement.yaml" else "policy"
    path = write(tmp_path, f'{entry}: "{canary.templates["globals"]}"\n', name)
    assert f'{path}:1: {entry} is "{{{{ cycler' in refusal(tmp_path)
    assert not canary.file.exists()


def test_dg_check_runs_no_code(tmp_path: Path, canary: Canary) -> None:
    write(tmp_path / "my_sets" / "defs", GOOD + f'  value_filter: "{canary.templates["globals"]}"\n')
    write(
        tmp_path,
        '[project]\nname = "my_sets"\n[tool.dg]\ndirectory_type = "project"\n'
        '[tool.dg.project]\nroot_module = "my_sets"\nregistry_modules = ["census_tf_dagster"]\n',
        "pyproject.toml",
    )
    (tmp_path / "my_sets" / "__init__.py").touch()
    command = [str(Path(sys.executable).with_name("dg")), "check", "yaml", "my_sets/defs/one"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not canary.file.exists()


@pytest.mark.parametrize(
    "text",
    [
        GOOD + "template_vars_module: .code\n",
        GOOD + "template_vars_module: census_tf_sets.one.code\n",
        GOOD + "post_processing:\n  assets:\n  - attributes:\n      kinds: ['TEMPLATE']\n",
    ],
    ids=["relative module", "module", "post-processing"],
)
def test_a_file_cannot_name_code(tmp_path: Path, canary: Canary, text: str) -> None:
    path = write(tmp_path, text.replace("'TEMPLATE'", f'"{canary.templates["globals"]}"'))
    write(tmp_path, f"import pathlib; pathlib.Path({str(canary.file)!r}).touch()\n", "one/code.py")
    assert f"{path}:6: {text.splitlines()[5].split(':')[0]} is not supported, because it can run code" in refusal(
        tmp_path
    )
    assert not canary.file.exists()


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("shards: '{{ env.SECRET }}'", "a valid integer"),
        ("device: '{{ env.SECRET }}'", "'cuda' or 'cpu'"),
        ("checkpoint_fingerprint: 'x{{ env.SECRET }}'", "match pattern"),
        ("value_filter: '{{ env.SECRET }}'", "With its variables put in, the value is refused"),
        ("value_filter: \"tissue == '{{ env.SECRET }}' or {{ env.SECRET }}\"", "the value is refused"),
        ("auto_start: '{{ env.SECRET }}'", "'off' or 'on'"),
        ("owners: ['{{ env.SECRET }}']", "match pattern"),
        ("placement: {purchase: '{{ env.SECRET }}'}", "'on_demand' or 'spot'"),
        ("publication: {model_link: '{{ env.SECRET }}'}", "URL of the model"),
        ("colour: '{{ env.SECRET }}'", "Known are"),
    ],
)
def test_a_refused_value_does_not_show_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, remedy: str
) -> None:
    monkeypatch.setenv("SECRET", "hunter2 hunter2")
    write(tmp_path, GOOD + f"  {line}\n")
    told = refusal(tmp_path)
    assert remedy in told
    assert "hunter2" not in told
    shown = refusal_of_dagster(tmp_path)
    assert "SECRET" in shown
    assert "hunter2" not in shown


def test_a_variable_is_put_in_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTER", "{{ env.INNER }}")
    monkeypatch.setenv("INNER", "hunter2")
    one = EmbeddingSet(name="one", organism="x", checkpoint="/models/{{ env.OUTER }}")
    assert one.checkpoint == "/models/{{ env.INNER }}"


def test_any_text_may_hold_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("NAME", "uno"), ("FILTER", "is_primary_data == True"), ("POLICY", "keep"), ("KIND", "spot")):
        monkeypatch.setenv(name, value)
    write(tmp_path, GOOD.replace("one", "'{{ env.NAME }}'") + "  value_filter: '{{env.FILTER}}'\n")
    write(tmp_path, "policy: '{{ env.POLICY }}'\n", "retention.yaml")
    write(tmp_path, "purchase: '{{ env.KIND }}'\n", "placement.yaml")
    (settings,) = load_settings(tmp_path).values()
    assert (settings.name, settings.value_filter) == ("uno", "is_primary_data == True")
    assert load_sets(tmp_path).assets
    assert read_retention(tmp_path).policy == "keep"
    placement = read_placement(tmp_path)
    assert placement is not None
    assert placement.purchase == "spot"
