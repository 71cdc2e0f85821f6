// Reads values off the curves under the pointer, and hides runs. The page says all without it.
for (const plot of document.querySelectorAll("[data-plot]")) {
  const {limits: [left, bottom, right, top, first, last, low, high, isLog], names} = JSON.parse(plot.dataset.plot);
  const svg = plot.querySelector("svg"), {width, height} = svg.viewBox.baseVal;
  const curves = Object.entries(names).map(([key, name]) => {
    const line = svg.querySelector("." + key), path = line.querySelector("path").getAttribute("d");
    return {name, line, points: [...path.matchAll(/([-\d.]+) ([-\d.]+)/g)].map(([, x, y]) => [x / width, 1 - y / height])};
  });
  const hair = svg.appendChild(document.createElementNS(svg.namespaceURI, "path"));
  hair.setAttribute("stroke", "#767676");
  const output = plot.appendChild(document.createElement("output"));
  const clear = () => { output.hidden = true; hair.setAttribute("d", ""); };
  clear();
  plot.onpointerleave = clear;
  plot.onpointermove = event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width;
    const said = curves.filter(({line}) => line.style.display != "none").flatMap(({name, points}) => {
      const [px, py] = points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
      const step = Math.round(first + (px - left) / (right - left) * (last - first)), share = (py - bottom) / (top - bottom);
      const value = isLog ? low * (high / low) ** share : low + (high - low) * share;
      return share < 0 || share > 1 ? [] : `${name} ${value.toLocaleString("en", {maximumSignificantDigits: 4})} at step ${step}`;
    });
    if (x < left || x > right) return clear();
    output.hidden = false;
    output.textContent = said.join("\n");
    output.style.right = x > .5 ? "auto" : 0;
    hair.setAttribute("d", `M ${x * width} ${(1 - top) * height} V ${(1 - bottom) * height}`);
  };
}
document.querySelectorAll(".legend label").forEach((label, n) => {
  const box = Object.assign(document.createElement("input"), {type: "checkbox", checked: true});
  const together = label.closest("ul").nextElementSibling;
  box.onchange = () => together.querySelectorAll(`.curve${n}, .raw${n}`).forEach(line => {
    line.style.display = box.checked ? "" : "none";
  });
  label.prepend(box);
});
