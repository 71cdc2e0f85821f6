// Shows the values of curves under the pointer, and hides runs. Without it the page shows all.
for (const plot of document.querySelectorAll("[data-plot]")) {
  const {limits: [left, bottom, right, top, first, last, low, high, isLog], names} = JSON.parse(plot.dataset.plot);
  const svg = plot.querySelector("svg"), {width, height} = svg.viewBox.baseVal;
  const curves = Object.entries(names).filter(([, name]) => name).map(([key, name]) => {
    const line = svg.querySelector("." + key), path = line.querySelector("path").getAttribute("d") ?? "";  // none of NaNs
    return {name, line, points: [...path.matchAll(/([-\d.]+) ([-\d.]+)/g)].map(([, x, y]) => [x / width, 1 - y / height])};
  }).filter(({points}) => points.length);
  const hair = svg.appendChild(document.createElementNS(svg.namespaceURI, "path"));
  const output = plot.appendChild(document.createElement("output"));
  plot.onpointerleave = () => { output.textContent = ""; hair.setAttribute("d", ""); };
  plot.onpointermove = event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width;
    output.textContent = curves.filter(({line}) => line.style.display != "none").flatMap(({name, points}) => {
      const [px, py] = points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
      const step = Math.round(first + (px - left) / (right - left) * (last - first)), up = (py - bottom) / (top - bottom);
      const value = isLog ? low * (high / low) ** up : low + (high - low) * up;
      return up < 0 || up > 1 ? [] : `${name} ${value.toLocaleString("en", {maximumSignificantDigits: 4})} at step ${step}`;
    }).join("\n");
    output.style.right = x > .5 ? "auto" : 0;
    hair.setAttribute("d", `M ${x * width} ${(1 - top) * height} V ${(1 - bottom) * height}`);
  };
}
document.querySelectorAll(".legend label").forEach((label, n) => {
  const box = Object.assign(document.createElement("input"), {type: "checkbox", checked: true});
  const lines = label.closest("ul").nextElementSibling.querySelectorAll(`.curve${n}, .raw${n}`);
  box.onchange = () => lines.forEach(line => { line.style.display = box.checked ? "" : "none"; });
  label.prepend(box);
});
