// Small plots: each a figure with its number now, a line of the last hour, and the same in words.

import { make, say } from "./parts.js";
import { clock, count, rate, span } from "./words.js";

const uPlot = globalThis.uPlot;
const SHORTEST_S = 300;
const HOUR_S = 3600;
const day = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", timeZone: "UTC" });
const drawn = new Map();

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// What is plotted. `value` turns a point into a number, `words` a number into text, `least` keeps a flat line flat.
export const FLOW = [
  {
    key: "entries",
    title: "Entries in",
    unit: "per second",
    value: (point, step) => point / step,
    words: rate,
    least: 1,
  },
  {
    key: "delivered",
    title: "Events out",
    unit: "per minute",
    value: (point, step) => (point * 60) / step,
    words: rate,
    least: 10,
  },
  { key: "queued", title: "Events waiting", unit: "in all queues", value: (point) => point, words: count, least: 10 },
  {
    key: "oldest_ms",
    title: "Oldest event",
    unit: "waiting",
    value: (point) => Math.floor(point / 1000),
    words: (seconds) => span(seconds * 1000),
    least: 60,
  },
];

function figure(key, title, unit) {
  const box = make("figure", { class: "plot", "data-plot": key });
  box.append(
    make("figcaption", {}, make("h3", {}, title), make("p", { class: "figure" }, make("b"), make("span", {}, ` ${unit}`))),
    make("div", { class: "canvas", "aria-hidden": "true" }),
    make("p", { class: "quiet words" }),
  );
  return box;
}

function options(width, height, bars, words) {
  const axis = {
    stroke: () => colour("--quiet"),
    font: "11px system-ui, sans-serif",
    grid: { stroke: () => colour("--line"), width: 1 },
    ticks: { show: false },
  };
  const clockOf = (moment) => new Date(moment * 1000).toISOString();
  return {
    width,
    height,
    padding: [8, 18, 0, 0],
    cursor: { show: false },
    legend: { show: false },
    scales: { x: { time: true }, y: { range: (_plot, _low, high) => [0, high] } },
    axes: [
      {
        ...axis,
        size: 22,
        gap: 2,
        space: 64,
        grid: { show: false },
        values: (_plot, splits) => splits.map((at) => (bars ? day.format(new Date(at * 1000)) : clockOf(at).slice(11, 16))),
        splits: (_plot, _axis, low, high) => moments(low, high, bars),
      },
      { ...axis, size: 48, gap: 4, space: 34, values: (_plot, splits) => splits.map(words) },
    ],
    series: [
      {},
      {
        stroke: () => colour("--accent"),
        fill: () => colour(bars ? "--accent" : "--accent-faint"),
        width: bars ? 0 : 1.5,
        points: { show: false },
        ...(bars ? { paths: uPlot.paths.bars({ size: [0.8, 16] }) } : {}),
      },
    ],
  };
}

// Where the axis says what time it is: each day, or so that there are four at the most.
function moments(low, high, bars) {
  const step = bars ? 86400 : ([60, 120, 300, 600, 900].find((one) => (high - low) / one <= 4) ?? 1200);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high; at += step) found.push(at);
  return found;
}

function draw(box, xs, ys, range, top, { bars = false, words = count } = {}) {
  const place = box.querySelector(".canvas");
  let plot = drawn.get(place);
  if (!plot) {
    plot = new uPlot(options(Math.max(120, place.clientWidth), 110, bars, words), [xs, ys], place);
    drawn.set(place, plot);
    new ResizeObserver(() => plot.setSize({ width: Math.max(120, place.clientWidth), height: 110 })).observe(place);
  }
  plot.batch(() => {
    plot.setData([xs, ys], false);
    plot.setScale("x", range);
    plot.setScale("y", { min: 0, max: top });
  });
}

export function redraw() {
  for (const plot of drawn.values()) plot.redraw(false, true);
}

export function drawFlow(place, history, nowMs) {
  const step = history.step_ms / 1000;
  const end = (history.end_ms ?? nowMs) / 1000;
  for (const what of FLOW) {
    let box = place.querySelector(`[data-plot="${what.key}"]`);
    if (!box) place.append((box = figure(what.key, what.title, what.unit)));
    const points = history.columns[what.key] ?? [];
    const xs = points.map((_, index) => end - (points.length - 1 - index) * step);
    const ys = points.map((point) => (point === null ? null : what.value(point, step)));
    const known = ys.filter((value) => value !== null);
    const highest = known.length ? Math.max(...known) : 0;
    // The figure is of the last minute for what flows, of this moment for what stands.
    const flows = what.key === "entries" || what.key === "delivered";
    const last = flows ? known.slice(-12) : known.slice(-1);
    const now = last.length ? last.reduce((sum, value) => sum + value, 0) / last.length : null;
    say(box.querySelector("b"), now === null ? "–" : what.words(now));
    const at = highest > 0 ? xs[ys.indexOf(highest)] : null;
    const lowest = `, highest ${what.words(highest)} at ${at === null ? "" : clock(at * 1000, nowMs).slice(0, -3)}`;
    const long = span((points.length || 1) * history.step_ms);
    say(
      box.querySelector(".words"),
      known.length === 0 ? "no figures yet" : highest > 0 ? `last ${long}${lowest}` : `none in the last ${long}`,
    );
    const width = Math.min(HOUR_S, Math.max(SHORTEST_S, points.length * step));
    draw(box, xs, ys, { min: end - width, max: end }, Math.max(what.least, highest * 1.15), { words: what.words });
  }
}

export function drawWeek(place, week) {
  let box = place.querySelector('[data-plot="week"]');
  if (!box) {
    box = figure("week", "Events made", "by hour of their windows");
    box.classList.add("wide");
    place.prepend(box);
  }
  const step = week.step_ms / 1000;
  const end = week.end_ms / 1000;
  const xs = week.events.map((_, index) => end - (week.events.length - 1 - index) * step);
  const highest = Math.max(...week.events);
  const all = week.events.reduce((sum, value) => sum + value, 0);
  say(box.querySelector("b"), count(all));
  const at = xs[week.events.indexOf(highest)] * 1000;
  say(box.querySelector(".words"), all ? `highest ${count(highest)} in the hour from ${clock(at, week.end_ms).slice(0, -3)}` : "none yet");
  draw(box, xs, week.events, { min: xs[0] - step, max: end + step }, Math.max(10, highest * 1.15), {
    bars: true,
    words: count,
  });
}

