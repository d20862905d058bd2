"""Each mistake in a set's YAML is reported with file, line, value and remedy, by Dagster's loading and by `check`."""

import json
import os
import re
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from types import ModuleType

import dagster as dg
import pytest
import yaml
from dagster.components.core.component_tree import ComponentTreeException
from dagster_shared.yaml_utils import parse_yaml_with_source_position

from census_tf_dagster.config.placement import read_placement
from census_tf_dagster.config.retention import read_retention
from census_tf_dagster.config.yaml_problems import read_documents
from census_tf_dagster.definitions import load_sets, load_settings
from census_tf_dagster.embedding_set import EmbeddingSet
from census_tf_dagster.errors import UserError
from tests.support.placements import PLACEMENT
from tests.support.project import REPOSITORY, Project

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
FILES = """\
type: census_tf_dagster.embedding_set.FileSet
attributes:
  name: lab
  files: /data/lab
  checkpoint: /models/tf_sapiens
"""
GPU = "  placement:\n    ecs:\n      task_definition: w\n      capacity_providers: {on_demand: gpu}\n"

# The text of one/defs.yaml, the line of the mistake, the value that is shown, and the remedy.
CASES = {
    "unknown field": (GOOD + "  shard: 4\n", 6, "attributes.shard is unknown", "Did you mean shards?"),
    "unknown field, far": (GOOD + "  colour: red\n", 6, "attributes.colour is unknown", "Known are: name, checkpoint"),
    "wrong type": (GOOD + "  shards: four\n", 6, "attributes.shards is 'four'", "a valid integer"),
    "null": (GOOD + "  shards:\n", 6, "attributes.shards is None", "a valid integer"),
    "text where a list stands": (GOOD + "  pretrained_embeddings: a.h5\n", 6, "'a.h5'", "a valid list"),
    "wrong item": (GOOD + "  pretrained_embeddings:\n  - a.h5\n  - 7\n", 8, "is 7", "a valid string"),
    "too small": (GOOD + "  shards: 0\n", 6, "attributes.shards is 0", "greater than or equal to 1"),
    "too large": (GOOD + "  shards: 10000\n", 6, "attributes.shards is 10000", "less than or equal to 9999"),
    "no choice": (GOOD + "  device: tpu\n", 6, "attributes.device is 'tpu'", "'cuda' or 'cpu'"),
    "precision": (GOOD + "  compute_precision: fp8\n", 6, "'fp8'", "'fp32', 'fp16' or 'bf16'"),
    "name": (GOOD.replace("one", "../one"), 3, "attributes.name is '../one'", "letters, digits and _"),
    "empty checkpoint": (
        GOOD.replace("/models/tf_sapiens", '""'),
        5,
        "attributes.checkpoint is ''",
        "It is empty. Expected a path",
    ),
    "missing": (GOOD.replace("  organism: homo_sapiens\n", ""), 3, "attributes.organism is missing", "Key of the"),
    "files: unknown field": (FILES + "  shards: 4\n", 6, "attributes.shards is unknown", "Known are: name, checkpoint"),
    "files: missing": (FILES.replace("  files: /data/lab\n", ""), 3, "attributes.files is missing", "Folder or S3"),
    "files: order": (
        FILES + "  gene_order: census\n",
        6,
        "attributes.gene_order is 'census'",
        "'file' or 'vocabulary'",
    ),
    "files: location": (FILES.replace("/data/lab", "https://data/lab"), 4, "'https://data/lab'", "s3://BUCKET/PREFIX"),
    "files: assays": (
        FILES + "  assay: a\n  assay_column: b\n",
        3,
        "attributes is {",
        "Only one of assay and assay_column may be given",
    ),
    "files: order of the array": (
        FILES + "  gene_order: file\n  like: /store/s/r/0123/embeddings\n",
        3,
        "attributes is {",
        "Leave out gene_order: file, because like takes",
    ),
    "files: other type": (FILES.replace("FileSet", "Files"), 1, "type is", "or `type: census_tf_dagster.embedding_set"),
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
        "expected, for example: is_primary_data ==",
    ),
    "filter, no test": (GOOD + "  value_filter: tissue\n", 6, "'tissue' is not a comparison", "expected, for example"),
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
    "YAML": (GOOD + "  shards: [4\n", 6, "this is not valid YAML", "close every bracket and quote"),
    "tab": (GOOD + "\tshards: 4\n", 6, "this is not valid YAML", "Indent with spaces"),
    "impossible date": (GOOD + "  mod: 2025-13-45\n", 6, "mod is '2025-13-45'", "a valid integer"),
    "empty": ("", 1, "the file is empty", "docs/configure.md"),
    "a text": ("hello\n", 1, "the file is 'hello'", "a mapping with `type:"),
    "type": (GOOD.replace(".EmbeddingSet", ".EmbedingSet"), 1, "EmbedingSet'", "Write `type: census_tf_dagster."),
    "no type": (GOOD.split("\n", 1)[1], 1, "type is missing", "Write `type: census_tf_dagster."),
    "no attributes": (GOOD.split("attr")[0], 1, "attributes is missing", "at least name, checkpoint, organism"),
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
def test_a_mistake_is_reported_with_file_line_value_and_remedy(tmp_path: Path, case: str) -> None:
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
    assert f"{second}:3: attributes.name is 'one', and the set in {first}:3 has the same name" in told
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


def test_a_set_names_one_entry_of_the_deployment_s_platform(tmp_path: Path) -> None:
    own = GOOD + "  placement:\n    kubernetes:\n      service_account: reader\n"
    path = write(tmp_path, own)
    missing = (
        f"{path}:7: kubernetes.image, kubernetes.nodes are missing in placement.yaml and in the set's own placement. "
        f"Change or add it in this set's placement, or in {tmp_path / 'placement.yaml'}."
    )
    assert missing in refusal(tmp_path)
    write(tmp_path, yaml.safe_dump(PLACEMENT), "placement.yaml")
    assert load_sets(tmp_path).assets


def test_a_shard_that_fits_no_node_of_its_pool(tmp_path: Path) -> None:
    write(tmp_path, yaml.safe_dump(PLACEMENT | {"instance_types": ["g6e.xlarge"]}), "placement.yaml")
    path = write(tmp_path, GOOD)
    assert f"{path}:3: cpu 4 does not fit g6e.xlarge, which has 3.92 for pods on EKS" in refusal(tmp_path)
    write(tmp_path, GOOD + "  placement: {cpu: 3.5}\n")
    assert load_sets(tmp_path).assets


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
    """Code that the author of a set's file might try to run, and a file that shows whether it ran."""

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
    """Load a folder as a Dagster project that knows the component, without this package's own checks."""
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
    assert "{{ env.NAME }} is the only template that is supported" in told
    assert "only template that is supported" in refusal_of_dagster(tmp_path)
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
        ("value_filter: '{{ env.SECRET }}'", "The value is invalid once its variables are inserted"),
        ("value_filter: \"tissue == '{{ env.SECRET }}' or {{ env.SECRET }}\"", "The value is invalid once"),
        ("auto_start: '{{ env.SECRET }}'", "'off' or 'on'"),
        ("owners: ['{{ env.SECRET }}']", "match pattern"),
        ("placement: {purchase: '{{ env.SECRET }}'}", "'on_demand' or 'spot'"),
        ("publication: {model_link: '{{ env.SECRET }}'}", "a valid URL"),
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


NOT_WHAT_IT_SEEMS = {
    "shards: true": "shards is True. It should be a valid integer",
    "shards: yes": "shards is True. It should be a valid integer",
    "shards: '4'": "shards is '4'. It should be a valid integer",
    "shards: 4.0": "shards is 4.0. It should be a valid integer",
    "shards: 010": "'010' is not a plain decimal number of at most 30 digits. Write plain decimal digits",
    "shards: 1:30": "'1:30' is not a plain decimal number",
    "shards: 1_0": "'1_0' is not a plain decimal number",
    "shards: 0x10": "'0x10' is not a plain decimal number",
    "shards: 0b1": "'0b1' is not a plain decimal number",
    "shards: !!int '4'": "the tag 'tag:yaml.org,2002:int' is not supported",
    "value_filter: !!python/name:os.system": "the tag 'tag:yaml.org,2002:python/name:os.system' is not supported",
    "mod: true": "mod is True. It should be a valid integer",
    "mod: 1e30": "mod is '1e30'. It should be a valid integer",
    "mod: 1.0e+30": "mod is 1e+30. It should be a valid integer",
    "mod: 1000000000001": "less than or equal to 1000000000",
    "mod: 11111111111111111111111111111111111111111111": "is not a plain decimal number",
    "batch_size: true": "batch_size is True. It should be a valid integer",
    "megabatch_size: '16'": "megabatch_size is '16'. It should be a valid integer",
    "reuse: 'yes'": "reuse is 'yes'. It should be a valid boolean",
    "reuse: 1": "reuse is 1. It should be a valid boolean",
    "auto_start: maybe": "auto_start is 'maybe'. It should be 'off' or 'on'",
    "auto_start: 1": "auto_start is 1. It should be 'off' or 'on'",
    "auto_start: {budget: .inf}": "'.inf' is not a plain decimal number",
    "auto_start: {budget: .nan}": "'.nan' is not a plain decimal number",
    "auto_start: {budget: '5'}": "auto_start.budget is '5'. It should be a valid number",
    "auto_start: {budget: true}": "auto_start.budget is True. It should be a valid number",
    "auto_start: {budget: 1.0e+300}": "auto_start.budget is 1e+300. It should be less than or equal to 1000000000",
    "auto_start: {budget: 5, budgets: 5}": "auto_start.budgets is unknown. Did you mean budget?",
    "placement: {cpu: .inf}": "'.inf' is not a plain decimal number",
    "placement: {cpu: '4'}": "placement.cpu is '4'. It should be a valid number",
    "placement: {cpu: true}": "placement.cpu is True. It should be a valid number",
    "placement: {usd_per_gpu_hour: -.inf}": "'-.inf' is not a plain decimal number",
    "placement: {usd_per_gpu_hour: 1.0e+99}": "usd_per_gpu_hour is 1e+99. It should be less than or equal to 100000",
    "placement: {memory_gib: 1000000000}": "memory_gib is 1000000000. It should be less than or equal to 65536",
    "placement: {gpus: true}": "placement.gpus is True. It should be a valid integer",
    'checkpoint_fingerprint: "\\0"': "checkpoint_fingerprint is '\\x00'. It should match pattern",
    'pretrained_embeddings: ["a\\nb"]': "pretrained_embeddings.0 is 'a\\nb'. It has a control character or line break",
    "pretrained_embeddings: [gs://a/b.h5]": "pretrained_embeddings.0 is 'gs://a/b.h5'. Expected a path, or s3://",
    'owners: ["ada@example.org\\n"]': "owners.0 is 'ada@example.org\\n'. It should match pattern",
    "owners: [ada@example.o_g]": "owners.0 is 'ada@example.o_g'. It should match pattern",
    "owners: [ada@example.organisation]": "owners.0 is 'ada@example.organisation'. It should match pattern",
    "owners: [ü@example.org]": "owners.0 is 'ü@example.org'. It should match pattern",
    "owners: ['a,b@example.org']": "owners.0 is 'a,b@example.org'. It should match pattern",
    'placement: {kubernetes: {image: "a\\nb", nodes: {spot: {node_selector: {a: b}}}}}': "It has a control character",
    '"\\ud800": 1': "the file has half of a UTF-16 pair",
    '"a\\nb": 1': "attributes.'a\\nb' is unknown",
    "? [a]\n  : 1": "this is not valid YAML: found unhashable key",
    "publication: 5": "publication is 5. It should be a mapping. Description of the published",
    "requirements: {env: A}": "attributes.requirements is unknown",
}
"""A line below `attributes`, and the problem that is reported."""

PUBLISHED = {
    ("title", 'A title\\nand "more"'): "It has a control character or line break",
    ("title", "x\\u2028y"): "It has a control character or line break",
    ("description", "a\\0b"): "It has a control character. Remove it",
    ("name", "Ada\\nL"): "It has a control character or line break",
    ("embedding_name", "x" * 101): "at most 100 characters",
    ("model_link", "javascript:alert(1)"): "URL scheme should be 'http', 'https' or 's3'",
    ("model_link", "file:///etc/passwd"): "URL scheme should be 'http', 'https' or 's3'",
    ("model_link", "https://ada:hunter2@example.org/"): "an address without user and password",
    ("submission_date", "20250101"): "It should be a day written as YYYY-MM-DD",
    ("submission_date", "2025-W01-1"): "It should be a day written as YYYY-MM-DD",
    ("DOI", "10.1000/x" + "x" * 1100): "It has 1109 characters. Expected at most 1024",
}


def only_mistake(folder: Path) -> str:
    (told,) = refusal(folder).splitlines()[1:]
    assert len(told) < 600, told
    return told


@pytest.mark.parametrize("line", NOT_WHAT_IT_SEEMS)
def test_a_value_that_is_not_what_it_seems(tmp_path: Path, line: str) -> None:
    write(tmp_path, GOOD + f"  {line}\n")
    assert NOT_WHAT_IT_SEEMS[line] in only_mistake(tmp_path)


@pytest.mark.parametrize("field", PUBLISHED, ids=str)
def test_what_everybody_would_read(tmp_path: Path, field: tuple[str, str]) -> None:
    name, value = field
    indent = "      " if name == "name" else "    "
    lines = [one for one in PUBLICATION.splitlines() if not one.startswith(f"{indent}{name}:")]
    at = next(i for i, one in enumerate(lines) if "primary_contact" in one) + 1 if name == "name" else 1
    quoted = '"' + value.replace('"', '\\"') + '"'
    write(tmp_path, GOOD + "\n".join([*lines[:at], f"{indent}{name}: {quoted}", *lines[at:]]) + "\n")
    told = only_mistake(tmp_path)
    assert PUBLISHED[field] in told
    assert "hunter2" not in told


@pytest.mark.parametrize(
    "text", ["shards: 12", "mod: +5", "reuse: yes", "auto_start: on", "auto_start: {budget: 2.5e+2}", "shards: 0o7"]
)
def test_ours_and_dagsters_reader_give_the_same(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, GOOD + f"  {text}\n  publication: {{submission_date: 2025-01-01}}\n")
    (document,), problems = read_documents(path)
    assert not problems
    assert document.value == parse_yaml_with_source_position(path.read_text(encoding="utf-8")).value


@pytest.mark.parametrize("checkpoint", ['"a\\0b"', "x" * 10_000, "S3://bucket/x", "s3:/bucket/x", "~nobody-of-this/x"])
def test_an_odd_checkpoint(tmp_path: Path, checkpoint: str) -> None:
    write(tmp_path, GOOD.replace("/models/tf_sapiens", checkpoint))
    assert "attributes.checkpoint is '" in only_mistake(tmp_path)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{chr(ord(name) - 1)}'] * 9)}]\n" for name in "bcdefghij"
)
NO_TEXT: dict[str, tuple[bytes, str]] = {
    "UTF-16": (GOOD.encode("utf-16"), "the file is not UTF-8 (byte 0xff). Save it as UTF-8."),
    "Latin-1": (GOOD.replace("one", "ünö").encode("latin-1"), ":3: the file is not UTF-8 (byte 0xfc)"),
    "binary": (bytes(range(256)) * 9, "the file is not UTF-8 (byte 0x80)"),
    "ZIP": (b"PK\x03\x04" + b"\x00" * 99, "the file has the character '\\x03'. Remove it."),
    "NUL": (GOOD.encode() + b"\0", ":6: the file has the character '\\x00'. Remove it."),
    "large": (b"# " + b"x" * 2**16, "the file has 65538 bytes. Expected a YAML file in UTF-8 of at most 65536 bytes."),
    "deep": (b"[" * 1000 + b"]" * 1000, "the file nests deeper than 20 levels"),
    "deep blocks": (b"".join(b" " * i + b"a:\n" for i in range(300)), "the file nests deeper than 20 levels"),
    "laughs": (LAUGHS.encode(), ":4: the file has more than 5000 values. A set needs fewer; each alias counts"),
    "many values": (b"- a\n" * 6000, "the file has more than 5000 values"),
    "within itself": (b"a: &a [*a]\n", "*a refers to itself"),
    "deep by aliases": (
        b"a: &a [[[[[[[[x]]]]]]]]\nb: &b [[[[[[[[*a]]]]]]]]\nc: [[[[[[[[*b]]]]]]]]\n",
        "the file nests deeper than 20 levels",
    ),
    "unknown alias": (b"a: *" + b"x" * 500, "this is not valid YAML: found undefined alias"),
    "template without quotes": (
        GOOD.encode() + b"  mod: {{ env.X }}\n",
        "this is not valid YAML: found unhashable key",
    ),
    "many mistakes": (
        GOOD.encode() + b"".join(b"  x%d: 1\n" % i for i in range(500)),
        "the file has 480 more mistakes",
    ),
}


@pytest.mark.parametrize("kind", NO_TEXT)
def test_a_file_that_is_no_small_yaml(tmp_path: Path, kind: str) -> None:
    content, expected = NO_TEXT[kind]
    path = write(tmp_path, "")
    path.write_bytes(content)
    start = time.process_time()
    told = refusal(tmp_path).splitlines()[1:]
    assert time.process_time() - start < 2
    assert expected in told[-1]
    assert len(told) == (21 if kind == "many mistakes" else 1)
    assert all(len(one) < 600 for one in told)


@pytest.mark.parametrize("kind", ["folder", "link", "pipe", "loop"])
def test_a_set_file_that_is_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "one" / "defs.yaml"
    path.parent.mkdir()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere" if kind == "link" else path)
    told = only_mistake(tmp_path)
    assert f"{path}:1: " in told
    assert "this is not a file" in told or "the file cannot be read: " in told


@pytest.mark.parametrize("name", ["placement.yaml", "retention.yaml"])
def test_a_deployments_file_that_is_none(tmp_path: Path, name: str) -> None:
    write(tmp_path, GOOD)
    (tmp_path / name).symlink_to("nowhere")
    assert f"{tmp_path / name}:1: the file cannot be read: No such file or directory." in only_mistake(tmp_path)


@pytest.mark.parametrize("name", ["one/two/defs.yaml", "defs.yaml", "component.yaml", "one/defs.yml"])
def test_a_component_that_dagster_would_load_unseen(tmp_path: Path, canary: Canary, name: str) -> None:
    write(tmp_path, GOOD.replace("one", "other"), "other/defs.yaml")
    path = write(tmp_path, f'"type": os.system\nattributes: {{a: "{canary.templates["globals"]}"}}\n', name)
    assert f"{path}:1: a set in a f" in only_mistake(tmp_path)
    assert not canary.file.exists()


def test_hidden_folders_are_left_alone_as_dagster_does(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    write(tmp_path, "nothing: 1\n", "..data/defs.yaml")
    assert list(load_settings(tmp_path)) == ["one"]


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path)
    with pytest.raises(UserError, match="holds more than 10000 entries or 20 levels; expected a folder of files"):
        load_sets(tmp_path)


def test_owners_that_dagster_takes(tmp_path: Path) -> None:
    write(tmp_path, GOOD + "  owners: [ada.l+x@uni-x.example.org, team:a-b, '_a@b.museum']\n")
    assert load_sets(tmp_path).assets


def test_aliases_are_understood_within_bounds(tmp_path: Path) -> None:
    contact = "primary_contact: &ada"
    text = PUBLICATION.replace("primary_contact:", contact) + "    additional_contacts: [*ada, *ada]\n"
    write(tmp_path, GOOD + text)
    (settings,) = load_settings(tmp_path).values()
    assert settings.publication is not None
    assert [one.name for one in settings.publication.additional_contacts] == ["Ada", "Ada"]
