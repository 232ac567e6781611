"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const onDark = JSON.parse(document.getElementById("dark").textContent);
  const charts = [...document.querySelectorAll(".chart")];
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

  const draw = (chart, printing) => {
    const dark = darkScheme.matches && !printing;
    const figure = withTheme(figures[Number(chart.dataset.figure)], dark);
    const layout = { ...figure.layout, template: { layout: theme(dark, printing) }, autosize: !printing, dragmode: false };
    if (printing) {
      const fullWidth = chart.closest(".charts").matches(".one, .roomy");
      layout.width = fullWidth ? PRINT_WIDTH : PRINT_WIDTH / 2 - 12;
      layout.height = chart.clientHeight;
    }
    const config = { responsive: true, displaylogo: false, displayModeBar: false, scrollZoom: false };
    return Plotly.react(chart, figure.data, layout, config);
  };

  const drawAll = (printing) => {
    for (const swatch of document.querySelectorAll(".swatch")) {
      const light = swatch.dataset.color;
      swatch.style.background = darkScheme.matches && !printing ? (onDark[light] ?? light) : light;
    }
    return Promise.all(charts.map((chart) => draw(chart, printing)));
  };

  // plotly.js is embedded compressed, which keeps the page small enough for mail.
  const loadPlotly = async () => {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent.trim()), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
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

  for (const button of document.querySelectorAll(".copy")) button.addEventListener("click", () => copy(button));

  const drawPage = async () => {
    if (!charts.length) return;
    if (typeof DecompressionStream === "undefined") {
      for (const chart of charts) {
        chart.style.height = "auto";
        chart.textContent = "This chart needs a browser of 2023 or later. The tables are complete.";
      }
      return;
    }
    await loadPlotly();
    await drawAll(false);
    darkScheme.addEventListener("change", () => drawAll(false));
    addEventListener("beforeprint", () => drawAll(true));
    addEventListener("afterprint", () => drawAll(false));
  };
  drawPage().finally(() => { document.documentElement.dataset.drawn = "yes"; });
})();
