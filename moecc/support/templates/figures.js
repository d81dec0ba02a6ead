// Plotly keeps its colours in the figure, so they are set again when the page turns dark.
const dark = matchMedia("(prefers-color-scheme: dark)");
function recolour() {
  const text = dark.matches ? "#e6e6e6" : "#1a1a1a", line = dark.matches ? "#3a3f45" : "#e5e5e5";
  for (const plot of document.querySelectorAll(".js-plotly-plot")) {
    const change = { "font.color": text, paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)" };
    for (const axis of Object.keys(plot.layout).filter(k => /^[xy]axis/.test(k))) {
      change[axis + ".gridcolor"] = line; change[axis + ".zerolinecolor"] = line;
      change[axis + ".linecolor"] = line;
    }
    Plotly.relayout(plot, change);
  }
}
async function draw() {
  for (const figure of document.querySelectorAll(".figure")) {
    const { data, layout } = JSON.parse(figure.querySelector("script").textContent);
    // The bar of tools would lie over the title of a narrow page; dragging zooms without it.
    await Plotly.newPlot(figure.querySelector("div"), data, layout,
      { responsive: true, displayModeBar: false });
  }
  recolour();
}
addEventListener("load", draw); dark.addEventListener("change", recolour);
