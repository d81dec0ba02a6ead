"""Recipes: read strictly, written whole, compared by what decides the function."""

from dataclasses import replace

import pytest

from moecc.errors import InputError, UsageError
from moecc.formats.run import GRAPH, LINEAGE, RECIPE
from moecc.support.documents import toml_lines
from moecc.train.recipe import (
    Corpus,
    MeshSection,
    ModelSection,
    RoutingSection,
    corpus_names,
)
from moecc.train.recipe_text import (
    load_recipe,
    parse_recipe,
    recipe_differences,
    recipe_digest,
    shipped_recipes,
    shipped_text,
    write_recipe,
)

SMALL = '[model]\nsource = "m"\n[data]\ntrain = [{tokens = "t"}]\n[run]\nsteps = 10\n'


def small(*sets):
    return parse_recipe(SMALL, "small.toml", sets=sets)


def problems(text, *sets, error=InputError):
    with pytest.raises(error) as caught:
        parse_recipe(text, "r.toml", sets=sets)
    return [str(p) for p in caught.value.problems]


def test_a_recipe_round_trips_with_every_default_written_out():
    recipe = small("mesh.mesh=data:2", 'optimizer.groups=[{match="moe", freeze=true}]')
    text = write_recipe(recipe)
    assert parse_recipe(text, "x") == recipe
    # TOML cannot say that a value is not set.
    assert [key for key in ("\nbalance", "\nz_loss", "None", "-1") if key in text] == []
    assert recipe_differences(recipe, replace(recipe, routing=RoutingSection(balance=0.0))) == [
        "routing.balance: none → 0.0"
    ]


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path):
    (tmp_path / "r.toml").write_text(SMALL, "utf-8-sig")
    assert load_recipe(str(tmp_path / "r.toml")).run.steps == 10


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid(name):
    recipe = load_recipe(f"recipe:{name}")
    assert parse_recipe(write_recipe(recipe), name) == recipe
    assert "moecc train recipe:" + name in shipped_text(name)


def test_all_problems_come_at_once_with_their_lines():
    text = (
        '[model]\nsource = 3\nstrat = "random"\n\n[data]\nbatch = 8.0\nobjective = "causel"\n'
        '[[data.train]]\ntokens = "a"\nwieght = 2\n\n[run]\nstep = 10\nmicro_batches = 0\n'
        'guard = {sigma = -1}\n[optimiser]\nrate = 1\n[mesh]\nmesh = "data"\n'
    )
    assert sorted(p.replace("\n", " ") for p in problems(text)) == sorted([
        "r.toml:2: model.source: a value of another type   expected: a text in quotes   found: 3",
        "r.toml:3: model.strat: no such key   hint: did you mean 'start'?",
        "r.toml:6: data.batch: a value of another type   expected: a whole number   found: 8.0",
        "r.toml:7: data.objective: no such choice   expected: causal | spans | masked | completion "
        "| classify   found: \"causel\"   hint: did you mean 'causal'?",
        "r.toml:10: data.train.0.wieght: no such key   hint: did you mean 'weight'?",
        "r.toml:13: run.step: no such key   hint: did you mean 'steps'?",
        "r.toml:12: run.steps: a key is missing   expected: 1 or more",
        "r.toml:14: run.micro_batches: a wrong value   expected: 1 or more   found: 0",
        "r.toml:15: run.guard.sigma: a wrong value   expected: 0 or more   found: -1",
        "r.toml:16: optimiser: no such key   hint: did you mean 'optimizer'?",
        "r.toml:19: mesh.mesh: not a mesh   expected: axes with sizes, data:8,model:4   "
        "found: data",
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("sets", "what"),
    [
        ("run.micro_batches=3", "run.micro_batches: the micro-batches do not divide the batch"),
        ("run.micro_batches=4; routing.groups=2", "parts of token groups"),
        ("routing.groups=3", "the token groups do not divide the batch"),
        ("routing.groups=24", "the token groups do not divide the sequences"),
        ("optimizer.warmup=11", "the warm-up is longer than the run"),
        ("optimizer.schedule=wsd", "wsd decays over its last steps"),
        (
            "optimizer.decay_steps=2",
            "optimizer.decay_steps: it has no effect where optimizer.schedule is constant",
        ),
        ("optimizer.end_factor=0.2", "where optimizer.schedule is constant"),
        ("optimizer.schedule=rsqrt; optimizer.end_factor=0.2", "optimizer.schedule is rsqrt"),
        ("optimizer.name=adafactor; optimizer.b1=0.5", "where optimizer.name is adafactor"),
        ("run.guard.sigma=0; run.guard.window=9", "where run.guard.sigma is 0"),
        ("run.export_to=auto", "where run.export_steps is 0"),
        ("loss.distill_steps=5", "where loss.distill is 0"),
        (
            "optimizer.schedule=wsd; optimizer.warmup=6; optimizer.decay_steps=5",
            "together are longer",
        ),
        (
            "run.steps=9; optimizer.schedule=wsd; optimizer.warmup=10; optimizer.decay_steps=20",
            "at most steps = 9\n  found: 10 + 20",
        ),
        ("optimizer.name=adam", "no such optimiser"),
        ("optimizer.update_clip=0.1", "where optimizer.name is adamw"),
        ("routing.dropout=1", "at least 0 and less than 1"),
        ("routing.balance=-1", "0 or more"),
        ('optimizer.groups=[{match="moe", from_step=10}]', "freeze = true never trains them"),
        ('optimizer.groups=[{match="moe", rate_factor=0}]', "more than 0"),
        ('optimizer.groups=[{match="moe", rate=1e-5}]', "did you mean 'rate_factor'?"),
        ('optimizer.groups=[{match="moe", rate_factor=2, freeze=true}]', "neither rate nor decay"),
        ('optimizer.groups=[{match="a"}, {match="a"}]', "an earlier group matches"),
        ("run.remat=some", "unknown remat"),
        ("run.evaluate_steps=5", "there is nothing to evaluate on"),
        ("run.export_steps=5", "exports need a family"),
        ("run.guard.window=1099511627776", "expected: 2 to 1,000,000"),
        ("run.dtype=f23", "unknown element type 'f23'"),
        ("mesh.rules=['tensor-parallel']", "mesh.rules: it has no effect where mesh.mesh is"),
        ("mesh.via=ring", "mesh.via: it has no effect where mesh.mesh is empty"),
        ("mesh.partition=gspmd", "where mesh.mesh is empty"),
        ("data.evaluate=[]; data.evaluate_batches=2", "where data.evaluate is empty"),
        ("mesh.mesh=data:8; mesh.via=capactiy", "unknown via"),
        ("mesh.mesh=data:8; mesh.partition=manual", "unknown partition"),
        ("data.train=[]", "the mixture is empty"),
        ("data.train=[{tokens='b/a'}, {tokens='b/a'}]", "more than one corpus is called 'b'"),
        ("data.train.0.weight=0", "more than 0"),
        ("data.decoder_seq=4", "where data.objective is causal"),
        ("data.noise_density=0.3", "where data.objective is causal"),
        ("data.objective=masked; data.mean_span=2", "where data.objective is masked"),
        ("model.start=random; model.moments=carry", "no moments to carry"),
        ("run.steps=1e400", "another type"),
        ("optimizer.rate=inf", "not a finite number"),
        ("seq=16", "did you mean 'data.seq'?"),
        ("optimizer.steps=16", "did you mean 'run.steps'?"),
        ("data.train=t", "expected: a list of tables with tokens, weight, name"),
        ("data.train.1.tokens=t", "expected: data.train=[…], with all of the list"),
        ("run.seed=9223372036854775808", "too large a number"),
    ],
)
def test_values_are_checked_together(sets, what):
    (problem,) = problems(SMALL, *sets.split("; "), error=UsageError)
    assert what in problem
    assert problem.startswith("--set ")


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        ("tokens/train", ["train"]),
        ("chat/train code/train/", ["chat", "code"]),
        ("train chat/train", ["here", "chat"]),
        ("chat/train wiki", ["train", "wiki"]),
    ],
)
def test_folders_that_are_called_alike_have_the_names_of_their_parents(folders, names, tmp_path):
    train = ", ".join(f"{{tokens='{folder}'}}" for folder in folders.split())
    text = SMALL.replace('{tokens = "t"}', train)
    recipe = parse_recipe(text, "r.toml", folder=tmp_path / "here")
    assert corpus_names(recipe.data.train) == names


def test_options_replace_values_and_words_are_texts():
    recipe = small("run.steps=20", "run.guard.sigma=3", "model.source=preset:smollm2-135m",
                   "data.train.0.weight=2", "data.evaluate=[{tokens='hf:a/b'}]")  # fmt: skip
    assert recipe.run.steps == 20
    assert recipe.run.guard.sigma == 3.0
    assert recipe.model.source == "preset:smollm2-135m"
    assert recipe.data.train[0].weight == 2.0
    assert recipe.data.evaluate[0].tokens == "hf:a/b"


def test_paths_that_do_not_exist_come_with_what_else_is_wrong(tmp_path):
    """With the lines of their keys; a step of a run and what is no path are left alone."""
    (tmp_path / "tokens").mkdir()
    (tmp_path / "r.toml").write_text(
        '[model]\nsource = "m"\nstrat = 1\n[data]\n'
        'train = [{tokens = "tokns"}, {tokens = "tokens"}, {tokens = "s3://b/t"}]\n'
        'evaluate = [{tokens = "x/t"}]\n[run]\nsteps = 10\n'
    )
    with pytest.raises(InputError) as caught:
        load_recipe(str(tmp_path / "r.toml"), check_paths=True)
    missing = "there is no such file or folder"
    assert [(p.where.rpartition("/")[2], p.message, p.hint) for p in caught.value.problems] == [
        ("r.toml:3: model.strat", "no such key", "did you mean 'start'?"),
        ("r.toml:2: model.source", missing, None),
        ("r.toml:5: data.train.0.tokens", missing, "did you mean 'tokens'?"),
        (
            "r.toml:6: data.evaluate.0.tokens",
            missing,
            "moecc tokens TEXT --tokenizer MODEL --out DIR writes a token folder",
        ),
    ]


def test_a_model_in_the_cache_of_the_hub_is_named_as_there(tmp_path, monkeypatch):
    """As in other commands; a run, which is parsed in another folder, has the same name."""
    (tmp_path / "r.toml").write_text(SMALL.replace('"m"', '"org/name"').replace('"t"', '"."'))
    with pytest.raises(InputError, match=r"hint: hf://org/name is the model of that name"):
        load_recipe(str(tmp_path / "r.toml"), check_paths=True)
    monkeypatch.setattr("moecc.train.recipe_text.cached", {"org/name": tmp_path}.get)
    recipe = load_recipe(str(tmp_path / "r.toml"), check_paths=True)
    assert recipe.model.source == "org/name"
    assert parse_recipe(write_recipe(recipe), "r", folder=tmp_path) == recipe
    (tmp_path / "org").mkdir()
    assert load_recipe(str(tmp_path / "r.toml")).model.source == str(tmp_path / "org" / "name")


def test_what_depends_on_a_replaced_value_is_left_out():
    """A recipe of eight devices runs on one, and a schedule is replaced alone."""
    text = (
        f'{SMALL}[mesh]\nmesh = "data:8"\nvia = "ring"\nrules = ["fsdp"]\n'
        '[optimizer]\nschedule = "wsd"\ndecay_steps = 4\nend_factor = 0.5\n'
    )
    sets = ["mesh.mesh=''", "optimizer.schedule=cosine"]
    recipe = parse_recipe(text, "r.toml", sets=sets)
    assert recipe.mesh == MeshSection()
    assert (recipe.optimizer.decay_steps, recipe.optimizer.end_factor) == (0, 0.5)


def test_paths_are_relative_to_the_file_and_of_options_to_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "r.toml").write_text(SMALL.replace('"m"', '"../m@best"'))
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("recipes/r.toml")
    assert recipe.model.source == str(tmp_path / "m@best")
    assert recipe.data.train[0].tokens == str(tmp_path / "recipes" / "t")
    moved = load_recipe("recipes/r.toml", ["data.train.0.tokens=t"])
    assert moved.data.train[0].tokens == str(tmp_path / "t")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "recipe:upcycle"),
        (b"a = '\xff'", "byte 5"),
        (b"[model]\nsource = \n", "line 2"),
        pytest.param(b"a = " + b"[" * 9000, r"not TOML|nested too deeply", id="deep"),
    ],
)
def test_bad_files_are_one_message(tmp_path, content, message):
    path = tmp_path / "upcycle.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_recipe(str(path))


def test_a_run_in_the_place_of_a_recipe_has_one(tmp_path):
    for name in (RECIPE, GRAPH, LINEAGE):
        (tmp_path / name).write_text(SMALL)
    with pytest.raises(InputError, match=r"recipe\.toml is the run's recipe; --resume"):
        load_recipe(str(tmp_path))


def test_a_misspelt_name_of_a_recipe_has_a_suggestion():
    with pytest.raises(UsageError, match="did you mean 'upcycle'"):
        load_recipe("recipe:upcycel")


def test_the_digest_is_of_the_function_and_not_of_where_it_runs():
    one = small()
    data = replace(one.data, train=(Corpus("/disk/t"),))
    moved = replace(one, mesh=MeshSection("data:8"), model=ModelSection("/other"), data=data)
    assert recipe_digest(moved) == recipe_digest(one)
    assert recipe_differences(one, moved) == []
    other = small("run.steps=12", "data.train.0.weight=2", "model.source=preset:mixtral-8x7b")
    assert recipe_digest(other) != recipe_digest(one)
    assert recipe_differences(one, other) == [
        "data.train.0.weight: 1.0 → 2.0",
        'model.source: none → "preset:mixtral-8x7b"',
        "run.steps: 10 → 12",
    ]


TOML = '''# a comment = [1]
top = 1
"quo.ted" = """
[not] = a table
"""
[a]
b.c = { d = 1, "e f" = [ { g = 1 } ] }
list = [ # [
  1, 1979-05-27 07:32:00,
  ["x", 'y]'], { h = 2.5e3 }
]
[[a.many]]
x = 1
[a.many.inner]
y = 2
[[a.many]]
x = 3
'''


def test_every_value_has_its_line():
    places = toml_lines(TOML)
    found = {"/".join(map(str, path)): line for path, line in places.items()}
    assert found == {
        "top": 2, "quo.ted": 3, "a": 6, "a/b": 7, "a/b/c": 7, "a/b/c/d": 7, "a/b/c/e f": 7,
        "a/b/c/e f/0": 7, "a/b/c/e f/0/g": 7, "a/list": 8, "a/list/0": 9, "a/list/1": 9,
        "a/list/2": 10, "a/list/2/0": 10, "a/list/2/1": 10, "a/list/3": 10, "a/list/3/h": 10,
        "a/many": 12, "a/many/0": 12, "a/many/0/x": 13, "a/many/0/inner": 14,
        "a/many/0/inner/y": 15, "a/many/1": 16, "a/many/1/x": 17,
    }  # fmt: skip
