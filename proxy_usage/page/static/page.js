// The operator's page: asks the sink every few seconds and shows its answer. It changes nothing anywhere.

import { drawFlow, drawWeek, redraw } from "./plots.js";
import { commandLine, empty, facts, foreign, keyed, make, quiet, renewed, say, shape, show, table } from "./parts.js";
import { FATES, amount, bytes, clock, count, meterName, rate, since, span } from "./words.js";

const EVERY_MS = 3000;
const PATIENCE_MS = 8000;
const LATE_MS = 20000;
const byId = (id) => document.getElementById(id);
const LEVELS = { failing: "Failing", warning: "Warning", note: "Note" };
const SHAPES = { starting: "waiting", draining: "note" };

let latest = null; // the last answer
let heard = 0; // when it came, by performance.now()
let silentSince = null; // since when there was none
let trouble = "";
let timer = null;
let asking = false;
let broken = false;

// --- asking ---------------------------------------------------------------------------------------------

async function ask() {
  const answer = await fetch("api/state", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
  if (answer.status === 401) throw new Error("The token is not taken any more: reload this page.");
  if (!answer.ok) throw new Error(`The sink answered ${answer.status}.`);
  return answer.json();
}

async function turn() {
  clearTimeout(timer);
  if (document.hidden || asking) return;
  asking = true;
  try {
    const state = await ask();
    latest = state;
    heard = performance.now();
    silentSince = null;
    broken = shown(state);
  } catch (error) {
    silentSince ??= performance.now();
    trouble = error.message.startsWith("The ") ? error.message : "";
  } finally {
    asking = false;
  }
  tell();
  timer = setTimeout(turn, EVERY_MS);
}

// Shows an answer. Returns whether that failed: with a page of another version than the sink, say.
function shown(state) {
  try {
    render(state);
    return false;
  } catch (error) {
    console.error(error);
    return true;
  }
}

// Whether the page is up to date: a clock that runs on, and a sentence that is read out when it is not.
function tell() {
  document.body.classList.toggle("stale", silentSince !== null || broken);
  if (document.hidden) return;
  const of = latest ? `${clock(latest.now_ms, latest.now_ms)} UTC` : "";
  if (broken) say(byId("silence"), "This page cannot show what the sink answers: reload it.");
  else if (silentSince === null) say(byId("silence"), "");
  else {
    const why = trouble || "The sink does not answer. Does it run? Is the network up?";
    say(byId("silence"), of ? `${why} Figures are of ${of}.` : why);
  }
  if (silentSince !== null) say(byId("live"), `No answer for ${span(performance.now() - (latest ? heard : silentSince))}`);
  else if (latest) say(byId("live"), `Live, figures of ${of}`);
}

// --- showing --------------------------------------------------------------------------------------------

function render(state) {
  document.title = `${{ ok: "✓", waiting: "…" }[state.state.word] ?? "!"} proxy-usage: ${state.state.text}`;
  renewed(byId("who"), [state.host, state.version], () => [
    make("span", {}, foreign(state.host)),
    make("span", {}, `version ${state.version}`),
  ]);
  headline(state);
  show(byId("first"), state.intake.read === 0);
  say(byId("first-grpc"), (Object.fromEntries(state.settings)["listen.grpc"] ?? "").split(" ")[0]);
  problems(state);
  drawFlow(byId("plots"), state.history, state.now_ms);
  outputs(state);
  nodes(state);
  audit(state);
  dead(state);
  held(state);
  tenants(state);
  week(state);
  store(state);
  renewed(byId("settings"), [state.settings, state.version], () => [
    facts([["version", state.version], ...state.settings.map(([key, value]) => [key, foreign(value)])]),
  ]);
}

function headline(state) {
  const { word, text, since_ms } = state.state;
  byId("state").dataset.word = word;
  byId("state-shape").setAttribute("href", `#shape-${SHAPES[word] ?? word}`);
  say(byId("headline"), text);
  const running = `running ${since(state.started_ms, state.now_ms)}`;
  const late = state.figures_ms !== null && state.now_ms - state.figures_ms > LATE_MS;
  const old = late ? ` Figures out of the store are of ${clock(state.figures_ms, state.now_ms)}.` : "";
  const sentence = word === "ok" || word === "waiting" || since_ms === null ? running : since(since_ms, state.now_ms);
  say(byId("state-since"), `${sentence[0].toUpperCase()}${sentence.slice(1)}.${old}`);
}

function problems(state) {
  show(byId("problems"), state.problems.length > 0);
  keyed(
    byId("problem-list"),
    state.problems,
    (one) => one.key,
    () => {
      const item = make("li", { class: "problem" });
      item.append(
        make("h3", {}, make("span", { class: "level" }), make("span", { class: "title" })),
        make("p", { class: "quiet since" }),
        make("p", { class: "detail" }, foreign("")),
        make("dl", { class: "what" }, make("div", {}, make("dt", {}, "Lost"), make("dd", { class: "lost" })),
          make("div", {}, make("dt", {}, "Do"), make("dd", { class: "do" }))),
        make("div", { class: "commands" }),
        make("p", { class: "quiet runbook" }),
      );
      return item;
    },
    (item, one) => {
      item.dataset.level = one.level;
      const level = item.querySelector(".level");
      if (level.dataset.level !== one.level) {
        level.dataset.level = one.level;
        level.replaceChildren(shape(one.level), LEVELS[one.level]);
      }
      say(item.querySelector(".title"), one.title);
      say(item.querySelector(".since"), one.since_ms === null ? "" : since(one.since_ms, state.now_ms));
      say(item.querySelector(".detail bdi"), one.detail);
      show(item.querySelector(".detail"), one.detail !== "");
      say(item.querySelector(".lost"), one.lost);
      say(item.querySelector(".do"), one.do);
      renewed(item.querySelector(".commands"), one.command, () => [one.command && commandLine(one.command)]);
      say(item.querySelector(".runbook"), one.runbook && `More in docs/runbook.md, ${one.runbook}`);
      show(item.querySelector(".runbook"), one.runbook !== "");
    },
  );
  show(byId("problems-more"), state.more_problems > 0);
  say(byId("problems-more"), `And ${count(state.more_problems)} more: proxy-usage status.`);
}

function outputs(state) {
  keyed(
    byId("output-list"),
    state.outputs,
    (one) => one.name,
    (one) => make("article", { class: "card" }, make("h3", {}, foreign(one.name)), make("div")),
    (card, one) => {
      const fates = { ...one.fates };
      const pending = fates.pending ?? 0;
      delete fates.pending;
      const waits = one.oldest_ms === null ? "none waits" : `${span(state.now_ms - one.oldest_ms)} old`;
      renewed(card.lastElementChild, [one, waits], () => [
        make("p", { class: "quiet" }, `${one.format}${one.target && " to "}`, foreign(one.target)),
        facts([
          ["state", outputState(one)],
          ["waiting", `${count(pending)} event${pending === 1 ? "" : "s"}`],
          ["oldest", waits],
          ...Object.entries(fates).filter(([, events]) => events).map(([fate, events]) => [FATES[fate] ?? fate, count(events)]),
        ]),
      ]);
    },
  );
}

function outputState(one) {
  const state = make("span", { class: "level" });
  const next = one.wait_ms > 0 ? `, next attempt in ${span(one.wait_ms + 999)}` : "";
  if (one.paused !== null) state.append(shape("failing"), `paused: ${one.paused}${next}`);
  else if (one.failures) state.append(shape("warning"), `${count(one.failures)} attempts failed: ${one.why}${next}`);
  else if (one.format === "none") state.append(shape("note"), "records only, sends nothing");
  else state.append(shape("ok"), "works");
  return state;
}

function nodes(state) {
  const { intake, rows } = state;
  const perSecond = (entries) => (intake.minute_ms ? rate((entries * 1000) / intake.minute_ms) : "–");
  renewed(byId("nodes"), intake, () => {
    if (!intake.nodes.length) return [empty("No Envoy has sent anything yet.")];
    const lines = intake.nodes.map((one) => [foreign(one.node), perSecond(one.minute), count(one.read)]);
    const { others } = intake;
    if (others.nodes) lines.push([`${count(others.nodes)} others`, perSecond(others.minute), count(others.read)]);
    return [table("Entries by node", ["Node", "Entries/s", "Read in all"], lines, [1, 2])];
  });
  const skipped = Object.values(rows.skipped).reduce((sum, n) => sum + n, 0);
  const invalid = Object.values(rows.invalid).reduce((sum, n) => sum + n, 0);
  const why = Object.entries(rows.skipped).map(([reason, n]) => `${reason} ${count(n)}`).slice(0, 4).join(", ");
  say(
    byId("rows"),
    `Since the start: ${count(rows.counted[""] ?? 0)} counted, ${count(skipped)} skipped${why && ` (${why})`}, ` +
      `${count(invalid)} invalid. ${count(intake.connections)} connections, ` +
      `${count(state.windows.open)} windows open, ${count(state.windows.tenants)} tenants today.`,
  );
}

function audit(state) {
  const crashed = state.intake.nodes.filter((one) => one.lost || one.unknown);
  renewed(byId("audit"), [state.audit, crashed], () => {
    const parts = [];
    if (state.audit === null) {
      parts.push(empty("No audit is set up: nobody compares what Envoys wrote with what arrived. docs/audit.md says how."));
    } else if (!state.audit.nodes.length) {
      parts.push(empty("The audit has no result yet."));
    } else {
      const known = (number) => (number === null ? "unknown" : count(number));
      const marks = { complete: "ok", missing: "warning", unknown: "note" };
      const lines = state.audit.nodes.map((one) => [
        foreign(one.node),
        make("span", { class: "level" }, shape(marks[one.state] ?? "note"), one.state),
        known(one.missing),
        known(one.flushed),
      ]);
      parts.push(table("Completeness by node", ["Node", "State", "Missing", "Of"], lines, [2, 3]));
      if (state.audit.others) parts.push(quiet(`And ${count(state.audit.others)} more: proxy-usage audit.`));
    }
    if (crashed.length) {
      const lines = crashed.map((one) => [foreign(one.node), `${count(one.lost)}${one.unknown ? " and unknown" : ""}`]);
      parts.push(table("Lost by crashes of this sink", ["Node", "Lost by crashes of this sink"], lines, [1]));
    } else if (state.intake.read) {
      parts.push(quiet("No crash of this sink has lost an entry."));
    }
    return parts;
  });
}

function dead(state) {
  renewed(byId("dead"), state.dead, () => {
    if (!state.dead.groups.length) return [empty("None. Every event was taken or waits.")];
    const items = state.dead.groups.map((one) =>
      make("article", { class: "card wide" },
        make("h3", {}, `${count(one.events)} `, foreign(one.reason)),
        make("p", {}, one.meaning, ", output ", foreign(one.output), `, first at ${clock(one.first_ms, state.now_ms)}.`),
        make("p", { class: "quiet" }, "Once the cause is mended, this sends them again:"),
        commandLine(one.command)),
    );
    if (state.dead.partial) items.push(quiet("There are more; only the oldest were looked at."));
    return items;
  });
}

function held(state) {
  renewed(byId("held"), state.unattributed, () => {
    const { groups, top, partial } = state.unattributed;
    if (!groups.length) return [empty("None. Every counted entry has a tenant.")];
    const items = groups.map((one) =>
      make("article", { class: "card wide" },
        make("h3", {}, `${count(one.rows)} `, foreign(one.reason)),
        make("p", {}, `${one.meaning}; first at ${clock(one.first_ms, state.now_ms)}.`),
        make("p", {}, one.do),
        commandLine(one.command)),
    );
    if (partial) items.push(quiet("There is more; only the latest was looked at."));
    if (top === null) items.push(quiet("What the entries said may name tenants: listen.http_tenants shows it, and so does proxy-usage unattributed ls."));
    else if (top.length) {
      const lines = top.map((one) => [one.value ? foreign(one.value) : "(no value)", one.reason, foreign(one.node), count(one.rows)]);
      items.push(make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "What held entries said" },
        table("What held entries said", ["Value", "Reason", "Node", "Entries"], lines, [3])));
    }
    return items;
  });
}

function tenants(state) {
  renewed(byId("tenants"), state.tenants, () => {
    if (state.tenants === null) {
      return [empty("Tenants are not named here. listen.http_tenants: true does, with a token or on a loopback address.")];
    }
    const day = clock(state.tenants.since_ms, state.now_ms);
    const lists = state.tenants.meters.map((one) => {
      const lines = one.first.map(([tenant, value]) => [foreign(tenant), amount(value, one.unit)]);
      const others = one.tenants - one.first.length;
      if (one.rest) lines.push([others > 0 ? `${count(others)} others` : "others", amount(one.rest, one.unit)]);
      const name = meterName(one.meter);
      const body = lines.length ? table(`Most ${name} by tenant`, ["Tenant", name], lines, [1]) : empty("none yet");
      return make("article", { class: "top" }, make("h3", {}, name), body);
    });
    return [quiet(`In windows that closed since ${day} UTC.`), make("div", { class: "tops" }, ...lists)];
  });
}

function week(state) {
  const place = byId("week");
  if (state.week === null) return;
  drawWeek(place, state.week);
  let sums = place.querySelector(".sums");
  if (!sums) place.append((sums = make("div", { class: "sums" })));
  renewed(sums, state.week.totals, () => [
    facts(state.week.totals.map((one) => [meterName(one.meter), amount(one.value, one.unit)])),
  ]);
}

function store(state) {
  const { path, used, room, occupied, limit, pressure } = state.store;
  const words = { none: "no", ledger: "the ledger gives way", merge: "waiting events are merged", exhausted: "nothing is left to merge" };
  const percent = room ? `${Math.round((used * 100) / room)} %` : "not measured yet";
  const age = span(state.windows.checkpoint_age_ms);
  renewed(byId("store"), [path, percent, occupied, limit, pressure, age], () => [
    facts([
      ["room used", room ? `${percent} (${bytes(used)} of ${bytes(room)})` : percent],
      ["on disk", occupied === null ? "not measured yet" : `${bytes(occupied)} of ${bytes(limit)}`],
      ["short of room", words[pressure] ?? pressure],
      ["last saved", `${age} ago`],
      ["file", foreign(path)],
    ]),
  ]);
}

// --- life -----------------------------------------------------------------------------------------------

document.addEventListener("visibilitychange", turn);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
setInterval(tell, 1000);
turn();
