"use strict";
// Draws plotly figures in the colors of the page. Sizes and colors are in data attributes, as a strict
// Content-Security-Policy forbids style attributes.
const reportCharts = (() => {
  const onDark = JSON.parse(document.getElementById("dark").textContent);
  const darkScheme = matchMedia("(prefers-color-scheme: dark)");
  const PRINT_WIDTH = 700; // CSS pixels: width of an A4 or letter page

  const cssVariable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const theme = (dark, printing) => {
    const ink = printing ? "#000000" : cssVariable("--ink");
    const soft = printing ? "#444444" : cssVariable("--soft");
    const grid = printing ? "#dddddd" : cssVariable("--grid");
    const axis = { gridcolor: grid, linecolor: grid, zerolinecolor: grid, tickfont: { size: 11, color: soft },
      title: { font: { size: 12, color: soft }, standoff: 8 } };
    return {
      font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif", size: 12, color: ink },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", xaxis: axis, yaxis: axis, colorway: ["#0072b2"],
      hoverlabel: { bgcolor: dark && !printing ? "#2a3038" : "#ffffff", bordercolor: soft, align: "left",
        font: { size: 12, color: dark && !printing ? "#e8ebef" : "#1b2027" } },
    };
  };

  const withTheme = (figure, dark) => {
    let text = JSON.stringify(figure);
    if (dark) for (const [light, other] of Object.entries(onDark)) text = text.replaceAll(light, other);
    return JSON.parse(text);
  };

  const draw = (chart, plain, printing = false) => {
    const dark = darkScheme.matches && !printing;
    const figure = withTheme(plain, dark);
    const layout = { ...figure.layout, template: { layout: theme(dark, printing) }, autosize: !printing, dragmode: false };
    if (printing) {
      const fullWidth = chart.closest(".charts").matches(".one, .roomy");
      layout.width = fullWidth ? PRINT_WIDTH : PRINT_WIDTH / 2 - 12;
      layout.height = chart.clientHeight;
    }
    const config = { responsive: true, displaylogo: false, displayModeBar: false, scrollZoom: false };
    return Plotly.react(chart, figure.data, layout, config);
  };

  const setSizes = (root) => {
    for (const grid of root.querySelectorAll(".charts[data-min-width]")) {
      grid.style.setProperty("--min-width", `${grid.dataset.minWidth}px`);
    }
    for (const chart of root.querySelectorAll(".chart")) {
      chart.style.height = `${chart.dataset.height}px`;
      if (chart.dataset.minWidth) chart.style.minWidth = `${chart.dataset.minWidth}px`;
    }
    for (const box of root.querySelectorAll(".scroll, .frame, .code pre")) reachable.observe(box);
  };

  // Regions of one page have different names.
  const unused = (name) => {
    const taken = new Set([...document.querySelectorAll("[role=region]")].map((region) => region.getAttribute("aria-label")));
    let label = name;
    for (let k = 2; taken.has(label); k++) label = `${name} ${k}`;
    return label;
  };

  // What is larger than its box can be scrolled by the keyboard.
  const reachable = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const isWhole = target.scrollWidth <= target.clientWidth + 1 && target.scrollHeight <= target.clientHeight + 1;
      if (isWhole || target.hasAttribute("tabindex")) continue;
      const title = target.closest("details")?.querySelector("summary") ?? target.closest("section")?.querySelector("h2");
      target.tabIndex = 0;
      target.setAttribute("role", "region");
      target.setAttribute("aria-label", unused(title?.textContent ?? document.title));
    }
  });

  const colorSwatches = (root, printing = false) => {
    for (const swatch of root.querySelectorAll(".swatch")) {
      const light = swatch.dataset.color;
      swatch.style.background = darkScheme.matches && !printing ? (onDark[light] ?? light) : light;
    }
  };

  const copy = async (button) => {
    const text = button.parentElement.querySelector("pre").textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const range = document.createRange();
      range.selectNodeContents(button.parentElement.querySelector("pre"));
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      button.textContent = "Selected: press Ctrl-C";
      return;
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  };

  document.addEventListener("click", (event) => { if (event.target.matches(".copy")) copy(event.target); });
  setSizes(document);
  colorSwatches(document);
  return { darkScheme, draw, setSizes, colorSwatches };
})();
