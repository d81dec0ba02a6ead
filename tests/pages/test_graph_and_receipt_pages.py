"""The pages of a graph with its rewrite, and of a receipt: what they say, and a browser of them."""

import json
import re
from pathlib import Path

import pytest

from moecc.cli.main import main

from .browser import BROWSER, MISSING, look

DENSE = str(Path(__file__).parents[1] / "golden" / "llama_gqa")
UPCYCLE = "upcycle{experts=4 top-k=2}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def graph_page(folder):
    graph, page = folder / "dense.moe", folder / "graph.html"
    assert main(["import", DENSE, "-o", str(graph)]) == 0
    command = ["opt", str(graph), "-p", UPCYCLE, "--html", str(page)]
    assert main([*command, "-o", str(folder / "sparse.moe")]) == 0
    return page


@pytest.fixture(scope="module")
def receipt_page(folder):
    out, page = str(folder / "sparse"), folder / "receipt.html"
    assert main(["convert", DENSE, out, "-p", UPCYCLE, "--to", "mixtral", "--verify"]) == 0
    assert main(["verify", out, "--html", str(page)]) == 0
    return page


def test_a_graph_is_shown_before_and_after(graph_page):
    text = graph_page.read_text("utf-8")
    before, after = text.split("<h2>after</h2>")
    assert "<h2>before</h2>" in before
    assert "assign_slots" not in before
    assert "upcycle/lift" in after
    assert "layers.0.ffn … layers.2.ffn, 3 alike" in after
    assert "tile(source(&#34;model.layers.0.mlp.up_proj.weight&#34;" in after
    assert "became 4 experts, top-2" in after


def test_edges_lead_to_nodes_and_layers_are_nested(graph_page):
    text = graph_page.read_text("utf-8")
    before, after = text.split("<h2>after</h2>")
    ids = re.findall(r' id="((?:before|after)-[^"]*)"', text)
    links = re.findall(r'href="#([^"]*)"', text)
    assert len(set(ids)) == len(ids)
    assert set(links) <= set(ids)
    # %dispatch is made of the tokens' norm, of the experts that route chose, and of their slots.
    node = after[after.index(" = dispatch ") :].split("</dl>")[0]
    takes, used_by = re.findall(r"<dt>(?:takes|used by)</dt><dd>(.*?)</dd>", node)
    anchors = dict.fromkeys(re.findall(r'href="#([^"]*)"', takes))
    makers = [re.search(f'id="{a}"><summary><code>.*? = (\\w+) ', after) for a in anchors]
    assert [maker and maker[1] for maker in makers] == ["rms_norm", "route", "assign_slots"]
    assert used_by.count("<a ") == 2
    # Of layers only the parts that are alike are said to be.
    layer = after.index("<code>layers.0 … layers.2</code>")
    assert layer < after.index("<code>layers.0.ffn … layers.2.ffn, 3 alike</code>")
    # The dataflow is drawn: a box for each place, and a dashed line from a layer to the next.
    assert ">layers.0.ffn × 3</text>" in before
    assert 'class="back"' in before


def test_values_pass_rows_between_boxes(graph_page):
    text = graph_page.read_text("utf-8")
    assert 'id="arrow"' in text
    assert re.search(r'<a href="#[^"]*" class="made"><rect [^>]*/><text [^>]*>route</text>', text)
    lanes = 0
    for drawing in re.findall(r'<svg [^>]* role="group" aria-label="(?:[^<]|<(?!/svg))*', text):
        boxes = [tuple(map(int, rect)) for rect in re.findall(
            r'<rect x="(\d+)" y="(\d+)" width="(\d+)" height="(\d+)"', drawing)]  # fmt: skip
        assert boxes
        # The line of a value passes the row of a box from its top to its bottom.
        for x, y, bottom in re.findall(r"[ C](\d+) (\d+)V(\d+)", drawing):
            lanes += 1
            for left, top, width, height in boxes:
                inside = left <= int(x) <= left + width
                assert not (inside and int(y) < top + height and int(bottom) > top)
    assert lanes > 5


def test_model_explorer_has_every_edge(graph_page, folder):
    """A loop's body is nested in it, and its edges end at nodes that there are."""
    out, rolled = folder / "explorer.json", UPCYCLE + ",roll-layers"
    command = ["opt", str(folder / "dense.moe"), "-p", rolled, "--explorer", str(out)]
    assert main([*command, "-o", str(folder / "rolled.moe")]) == 0
    collection = json.loads(out.read_text("utf-8"))
    assert collection["label"]
    for graph in collection["graphs"]:
        nodes = {node["id"]: node for node in graph["nodes"]}
        assert len(nodes) == len(graph["nodes"])
        for node in graph["nodes"]:
            for at, edge in enumerate(node["incomingEdges"]):
                source = nodes[edge["sourceNodeId"]]
                assert int(edge["sourceNodeOutputId"]) < len(source["outputsMetadata"])
                assert edge["targetNodeInputId"] == str(at)
    before, after = collection["graphs"]
    assert "layers/0/ffn" in {node["namespace"] for node in before["nodes"]}
    assert "layers/{0..2}/ffn" in {node["namespace"] for node in after["nodes"]}
    (scan,) = (node for node in after["nodes"] if node["label"] == "scan")
    assert any(edge["sourceNodeId"].startswith(f"{scan['id']}/") for edge in scan["incomingEdges"])
    assert any(a["key"] == "weight" for node in before["nodes"] for a in node["attrs"])
    assert main([*command, "-o", str(folder / "again.moe")]) == 1, "nothing is replaced unasked"


def test_pages_load_nothing(graph_page, receipt_page):
    for page in (graph_page, receipt_page):
        text = page.read_text("utf-8")
        assert re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', text) == []
        assert "plotly" not in text.lower()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason=MISSING)
@pytest.mark.parametrize("width", [1100, 480])
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(graph_page, receipt_page, width, dark):
    graph, receipt = (look(page, width=width, dark=dark) for page in (graph_page, receipt_page))
    for seen in (graph, receipt):
        assert seen.console == []
        assert seen.probe["wide"] == []
        assert (seen.probe["text"] == "rgb(26, 26, 26)") == (not dark)
    assert graph.probe["unfolds"]
    assert graph.probe["focused"], "the keyboard reaches what unfolds"
    nodes = graph.probe["searched"]
    assert nodes
    assert all("route" in node.lower() for node in nodes)
    assert receipt.probe["tables"] == 5


def test_a_receipt_says_what_was_found(receipt_page):
    text = receipt_page.read_text("utf-8")
    for words in (
        "reassociation",
        "upcycle{experts=4}",
        "KL divergence, nats a token",
        "llama.cpp",
        "numpy",
    ):
        assert words in text
