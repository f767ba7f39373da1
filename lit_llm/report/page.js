"use strict";
(() => {
  const root = document.documentElement;
  root.lang = (navigator.language || "en").toLowerCase().startsWith("zh") ? "zh" : "en";
  document.getElementById("switch").addEventListener("click", () => { root.lang = root.lang === "zh" ? "en" : "zh"; });

  const charts = JSON.parse(document.getElementById("points").textContent);
  const make = (name, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  const at = (value, [low, high, first, last]) => first + (value - low) / (high - low) * (last - first);
  const nearest = (steps, wanted) => {
    let low = 0, high = steps.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] < wanted) low = middle + 1; else high = middle;
    }
    return low && wanted - steps[low - 1] < steps[low] - wanted ? low - 1 : low;
  };

  document.querySelectorAll("figure[data-chart]").forEach((figure) => {
    const chart = charts[Number(figure.dataset.chart)], svg = figure.querySelector("svg");
    const output = figure.querySelector("output");
    const every = [...new Set(chart.series.flatMap((series) => series.steps))].sort((a, b) => a - b);
    const top = Math.min(chart.y[2], chart.y[3]), bottom = Math.max(chart.y[2], chart.y[3]);
    const cursor = make("line", { class: "cursor", y1: top, y2: bottom, visibility: "hidden" });
    const dots = chart.series.map((_, place) => make("circle", { class: "s" + place % 6, r: 4.5, visibility: "hidden" }));
    svg.append(cursor, ...dots);
    let place = every.length - 1;

    const show = (wanted) => {
      place = wanted;
      const step = every[place];
      cursor.setAttribute("x1", at(step, chart.x));
      cursor.setAttribute("x2", at(step, chart.x));
      cursor.setAttribute("visibility", "visible");
      const words = chart.series.map((series, number) => {
        const found = nearest(series.steps, step), value = series.values[found], here = series.steps[found];
        dots[number].setAttribute("cx", at(here, chart.x));
        dots[number].setAttribute("cy", at(value, chart.y));
        dots[number].setAttribute("visibility", "visible");
        const band = series.band && series.band[found] ? " [" + series.band[found].join(", ") + "]" : "";
        return series.name + (here === step ? " " : " (" + here.toLocaleString("en") + ") ") + Number(value.toPrecision(6)) + band;
      });
      output.textContent = step.toLocaleString("en") + ": " + words.join(", ");
    };
    const follow = (event) => {
      const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
      const [low, high, first, last] = chart.x;
      show(nearest(every, low + (x - first) / (last - first) * (high - low)));
    };
    svg.addEventListener("pointermove", follow);
    svg.addEventListener("pointerdown", follow);
    svg.addEventListener("focus", () => show(place));
    svg.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: every.length - 1 };
      if (!(event.key in moves)) return;
      event.preventDefault();
      show(Math.max(0, Math.min(every.length - 1, moves[event.key])));
    });
  });
})();
