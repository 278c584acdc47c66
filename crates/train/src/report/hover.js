// Shows the values under the pointer. The page reads as well without it.
for (const chart of document.querySelectorAll("svg.chart")) {
  const axis = (text) => {
    const [scale, ...numbers] = text.split(" ");
    const [low, high, from, to] = numbers.map(Number);
    const back = { Linear: (v) => v, Log2: (v) => 2 ** v, Log10: (v) => 10 ** v }[scale];
    return (place) => back(low + ((place - from) / (to - from)) * (high - low));
  };
  const { width, height } = chart.viewBox.baseVal;
  const [xValue, yValue] = [axis(chart.dataset.x), axis(chart.dataset.y)];
  const number = (v) => Number(v.toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 4 });
  const lines = [...chart.querySelectorAll("path[data-name]:not(.faint)")].map((path) => ({
    name: path.dataset.name,
    points: [...path.getAttribute("d").matchAll(/([\d.-]+) ([\d.-]+)/g)].map((m) => [Number(m[1]), Number(m[2])]),
  })).filter((line) => line.points.length);
  if (!lines.length) continue;
  const make = (tag, name) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    element.setAttribute("class", name);
    return chart.appendChild(element);
  };
  const [cursor, reading] = [make("path", "cursor"), make("text", "reading")];
  chart.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse()).x;
    const near = lines.map(({ name, points }) =>
      [name, points.reduce((best, point) => (Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best))]);
    const x = near[0][1][0];
    cursor.setAttribute("d", `M${x} 50V${height - 52}`);
    reading.textContent = `${number(xValue(x))}: ` + near.map(([name, p]) => `${name} ${number(yValue(p[1]))}`).join(", ");
    reading.setAttribute("x", x > width / 2 ? x - 8 : x + 8);
    reading.setAttribute("text-anchor", x > width / 2 ? "end" : "start");
    reading.setAttribute("y", height - 60);
  });
  chart.addEventListener("pointerleave", () => (cursor.setAttribute("d", ""), (reading.textContent = "")));
}
