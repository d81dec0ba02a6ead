// The search shows the nodes that match and unfolds their layers; no word folds all again.
const find = document.getElementById("find"), count = document.getElementById("count");
function search() {
  const word = find.value.trim().toLowerCase();
  let shown = 0;
  for (const group of document.querySelectorAll(".group")) {
    let here = 0;
    for (const node of group.querySelectorAll(".node")) {
      node.hidden = word !== "" && !node.textContent.toLowerCase().includes(word);
      here += !node.hidden;
    }
    group.hidden = here === 0;
    group.open = word !== "" && here > 0;
    shown += here;
  }
  count.textContent = word ? shown + " nodes" : "";
}
find.addEventListener("input", search);
