"use strict";
// The arithmetic is that of costs.py: `Step` and `roofline`.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const form = document.getElementById("step");
  const body = document.querySelector("#parts tbody");
  const total = document.getElementById("step-total");

  const short = (value, units, base) => {
    let index = 0;
    while (Math.abs(value) >= base && index < units.length - 1) { value /= base; index += 1; }
    return `${value >= 100 ? value.toFixed(0) : Number(value.toPrecision(3))} ${units[index]}`;
  };
  const si = (value) => short(value, ["", "K", "M", "G", "T", "P"], 1000);
  const bytes = (value) => short(value, ["B", "KiB", "MiB", "GiB", "TiB"], 1024);
  const seconds = (value) => short(value * 1e9, ["ns", "µs", "ms", "s"], 1000);

  const step = () => {
    const field = (name) => Math.max(Number(form.elements[name].value) || 0, name === "bytes" || name === "flops" ? 1e-9 : 1);
    const sequences = field("sequences"), context = field("context");
    const rates = { bytes: field("bytes") * 1e9, flops: field("flops") * 1e9 };
    if (form.elements.phase.value === "decode") {
      return { tokens: sequences, sequences, context, keys: context, rows: sequences, rates };
    }
    return { tokens: sequences * context, sequences, context, keys: (context + 1) / 2, rows: sequences, rates };
  };

  const work = (cost, s) => {
    const limited = (count, most) => (cost.window === null ? count : Math.min(count, most));
    const seen = limited(s.keys, cost.window);
    const flops = s.tokens * (cost.flops_per_token + seen * cost.flops_per_key) + s.rows * cost.flops_per_row;
    const touched = cost.share_of_weights === 1 ? 1 : 1 - (1 - cost.share_of_weights) ** s.tokens;
    const keys = limited(s.context, cost.window + Math.floor(s.tokens / s.sequences) - 1);
    const moved = cost.weight_bytes * touched + s.tokens * cost.bytes_per_token + s.rows * cost.bytes_per_row
      + s.sequences * (keys * cost.state_bytes_per_key + cost.state_bytes_per_sequence);
    return { flops, moved };
  };

  const cell = (row, text, className) => {
    const td = row.insertCell();
    td.textContent = text;
    if (className) td.className = className;
    return td;
  };

  const draw = () => {
    const s = step();
    const rows = data.parts.map((part) => {
      const sum = { part, flops: 0, moved: 0, time: 0, compute: 0 };
      for (const cost of part.calls) {
        const { flops, moved } = work(cost, s);
        const forFlops = flops / s.rates.flops, forBytes = moved / s.rates.bytes;
        sum.flops += cost.count * flops;
        sum.moved += cost.count * moved;
        sum.time += cost.count * Math.max(forFlops, forBytes);
        if (forFlops > forBytes) sum.compute += cost.count * forFlops;
      }
      return sum;
    }).sort((a, b) => b.time - a.time);
    const whole = rows.reduce((sum, row) => sum + row.time, 0);
    const longest = Math.max(...rows.map((row) => row.time), 1e-30);
    body.replaceChildren();
    for (const { part, flops, moved, time, compute } of rows) {
      const row = body.insertRow();
      cell(row, part.name, "mono");
      const layers = cell(row, "");
      const square = document.createElement("span");
      square.className = part.kind < 0 ? "square" : `square kind-${part.kind % 8}`;
      square.textContent = part.kind < 0 ? "·" : `${document.querySelectorAll(`.strip .kind-${part.kind % 8}`).length}×`;
      layers.append(square);
      cell(row, si(flops), "n");
      cell(row, bytes(moved), "n");
      cell(row, seconds(time), "n");
      cell(row, `${(100 * time / whole).toFixed(1)} %`, "n");
      const bar = document.createElement("span");
      bar.className = "bar";
      const fill = document.createElement("span");
      fill.style.width = `${100 * time / longest}%`;
      if (compute > time / 2) fill.className = "compute";
      bar.append(fill);
      cell(row, "", "wide").append(bar);
    }
    total.textContent = `${seconds(whole)} for this step, ${si(s.tokens / whole)} tokens a second at the most`;
    total.dataset.seconds = String(whole);
  };

  form.addEventListener("input", draw);
  form.addEventListener("submit", (event) => event.preventDefault());
  draw();
})();
