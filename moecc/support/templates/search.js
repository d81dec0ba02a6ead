// The search shows the nodes that match and unfolds their layers; no word folds all again.
const find = document.getElementById("find"), count = document.getElementById("count");
function search() {
  const word = find.value.trim().toLowerCase();
  let shown = 0;
  for (const node of document.querySelectorAll(".node")) {
    node.hidden = word !== "" && !node.textContent.toLowerCase().includes(word);
    shown += !node.hidden;
  }
  for (const group of document.querySelectorAll(".group")) {
    group.hidden = group.querySelector(".node:not([hidden])") === null;
    group.open = word !== "" && !group.hidden;
  }
  count.textContent = word ? shown + " nodes" : "";
}
find.addEventListener("input", search);
// A link to a node, or to a layer, unfolds what it is in.
function unfold() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let part = target; part; part = part.parentElement)
    if (part.tagName === "DETAILS") { part.open = true; part.hidden = false; }
  if (target) target.scrollIntoView();
}
addEventListener("hashchange", unfold); unfold();
