(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const charts = [...document.querySelectorAll(".chart")];

  const drawAll = (printing) => {
    reportCharts.colorSwatches(document, printing);
    return Promise.all(charts.map((chart) => reportCharts.draw(chart, figures[Number(chart.dataset.figure)], printing)));
  };

  // plotly.js is embedded compressed, which keeps the page small enough for mail.
  const loadPlotly = async () => {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent.trim()), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  };

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
    reportCharts.darkScheme.addEventListener("change", () => drawAll(false));
    addEventListener("beforeprint", () => drawAll(true));
    addEventListener("afterprint", () => drawAll(false));
  };
  drawPage().finally(() => { document.documentElement.dataset.drawn = "yes"; });
})();
