"use strict";
// Draws the figures and switches the theme. Figures are JSON in script elements; colours of a theme are added here.
(() => {
  const root = document.documentElement;
  const themes = {
    light: { ink: "#2b3440", grid: "#e3e7ec", tip: "#ffffff", sequential: ["#f1f5f9", "#9cc3e6", "#3b82c4", "#12395f"],
             diverging: ["#b2485b", "#e8b4bc", "#f4f4f2", "#9cc3e6", "#1f5a92"] },
    dark: { ink: "#d5dbe3", grid: "#2c3440", tip: "#1c232d", sequential: ["#1a212b", "#28507a", "#4f9ade", "#d7ebff"],
            diverging: ["#f08a9b", "#8a4451", "#222a35", "#2f6096", "#8cc4fa"] },
  };
  const system = matchMedia("(prefers-color-scheme: dark)");
  const theme = () => root.dataset.theme || (system.matches ? "dark" : "light");
  const scale = (colors) => colors.map((color, i) => [i / (colors.length - 1), color]);

  function themed(layout) {
    const t = themes[theme()];
    const out = JSON.parse(JSON.stringify(layout));
    const narrow = innerWidth < 600;
    Object.assign(out, { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: t.ink, size: narrow ? 11 : 12, family: getComputedStyle(document.body).fontFamily },
      hoverlabel: { bgcolor: t.tip, bordercolor: t.grid, font: { color: t.ink }, align: "left" } });
    for (const key of Object.keys(out)) {
      if (/^[xy]axis\d*$/.test(key)) Object.assign(out[key], { gridcolor: t.grid, zerolinecolor: t.grid, linecolor: t.grid });
    }
    if (out.legend) out.legend.maxheight = 1;  // no scroll bar of its own
    if (out.coloraxis) {
      out.coloraxis.colorscale = scale(t[(out.meta || {}).scale || "sequential"]);
      if (narrow) Object.assign(out.coloraxis.colorbar, { orientation: "h", y: 1, yanchor: "bottom", x: 0.5, thickness: 8,
        title: { text: out.coloraxis.colorbar.title.text, side: "top" } });
      if (narrow) { out.margin.t += 60; out.height += 60; }
    }
    return out;
  }

  const plots = [...document.querySelectorAll(".plot")];
  const content = (plot) => JSON.parse(document.getElementById(plot.id + "-data").textContent);
  async function draw(plot) {
    const { data, layout } = content(plot);
    for (const trace of data) if (trace.marker?.line) trace.marker.line.color = themes[theme()].tip;
    const figure = themed(layout);
    const options = { responsive: true, displayModeBar: false };
    await Plotly.react(plot, data, { ...figure, height: figure.height + 45 * data.length }, options);
    const legend = plot.querySelector(".legend");  // as many lines as the width asks for: the figure grows by them
    const room = legend ? Math.ceil(legend.getBBox().height) + 6 : 0;
    await Plotly.relayout(plot, { height: figure.height + room, "margin.t": figure.margin.t + room });
  }

  function label() {
    const button = document.getElementById("theme");
    const other = theme() === "dark" ? "light" : "dark";
    button.textContent = other === "dark" ? "☾ Dark" : "☀ Light";
    button.setAttribute("aria-label", `Switch to the ${other} theme`);
  }

  async function redraw() {
    label();
    if (window.Plotly) for (const plot of plots) await draw(plot);
    root.dataset.drawn = theme();
  }

  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = theme() === "dark" ? "light" : "dark";
    redraw();
  });
  system.addEventListener("change", redraw);
  let width = innerWidth, waiting;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      if (innerWidth !== width && root.dataset.drawn) redraw();
      width = innerWidth;
    }, 200);
  });
  label();

  async function unpacked(element) {
    const bytes = Uint8Array.from(atob(element.textContent.trim()), (c) => c.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }

  async function start() {
    const script = document.createElement("script");
    script.textContent = await unpacked(document.getElementById("plotly"));
    document.head.append(script);
    for (const plot of plots) {
      await draw(plot);
      plot.classList.add("drawn");
      await new Promise((done) => setTimeout(done));
    }
    root.dataset.drawn = theme();
  }
  start().catch((error) => {
    root.dataset.drawn = "failed";
    for (const plot of plots) plot.textContent = `This figure cannot be drawn here (${error}); its numbers are below.`;
  });
})();
