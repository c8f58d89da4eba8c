"use strict";
const root = document.documentElement;
document.getElementById("theme").addEventListener("click", () => {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  root.dataset.theme = (root.dataset.theme || system) === "dark" ? "light" : "dark";
});

// The values at the step nearest to the pointer; positions are fractions of the plot.
const tip = document.getElementById("tip");
for (const plot of document.querySelectorAll(".plot")) {
  const { box, range, x: label, lines } = JSON.parse(plot.dataset.panel);
  const [left, top, width, height] = box;
  const cross = document.createElement("div");
  cross.className = "cross";
  cross.hidden = true;
  cross.style.top = 100 * top + "%";
  cross.style.height = 100 * height + "%";
  plot.append(cross);
  const hide = () => { cross.hidden = tip.hidden = true; };
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("pointermove", (event) => {
    const area = plot.getBoundingClientRect();
    const at = ((event.clientX - area.left) / area.width - left) / width;
    const places = lines.flatMap((line) => line.x);
    if (!(at >= -0.02 && at <= 1.02) || !places.length) return hide();
    const wanted = range[0] + at * (range[1] - range[0]);
    const x = places.reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
    tip.replaceChildren(label.replace(/ \(.*/, "") + " " + x);
    for (const line of lines) {
      const i = line.x.indexOf(x);
      if (i < 0 || line.y[i] === null) continue;
      const row = document.createElement("div"), dot = document.createElement("i");
      const value = document.createElement("b");
      dot.style.background = line.colour === null ? "var(--muted)" : `var(--c${line.colour % 8})`;
      value.textContent = Number(line.y[i].toPrecision(4));
      row.append(dot, line.label, value);
      tip.append(row);
    }
    cross.style.left = 100 * (left + width * (x - range[0]) / (range[1] - range[0])) + "%";
    cross.hidden = tip.hidden = false;
    const wide = document.documentElement.clientWidth;
    const put = Math.min(event.pageX + 14, wide - tip.offsetWidth - 8);
    tip.style.left = Math.max(8, put) + "px";
    tip.style.top = event.pageY + 14 + "px";
  });
}
