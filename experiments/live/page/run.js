// The run as a whole: its head, the comparison of its frameworks, and what went wrong.

import { at, count, keep, make, mark, write } from "./dom.js";

const WORDS = { starting: "starting", running: "running", finished: "finished", failed: "failed", interrupted: "interrupted" };

export function drawStanding(state) {
  const run = state.view.run;
  const over = run && !["running", "starting"].includes(run.status);
  const shown = over ? run.status : state.standing === "connected" ? run?.status ?? "starting" : state.standing;
  const lost = run ? "connection lost" : "the testbed is starting";
  write(at("status"), shown === "away" || (shown === "connecting" && !run) ? lost : WORDS[shown] ?? shown);
  mark(at("status"), "data-status", shown === "away" && !run ? "connecting" : shown);
  at("again").hidden = !(over && state.standing === "away");
}

export function drawHead(state) {
  drawStanding(state);
  const { run, round } = state.view;
  if (!run) return;
  write(at("name"), run.name);
  document.title = `${run.name} · SemCT live`;
  write(at("description"), run.description);
  const rounds = Array.from({ length: run.rounds }, (_, index) => ({
    index,
    framework: run.frameworks[index % run.frameworks.length],
    repetition: Math.floor(index / run.frameworks.length),
  }));
  const shown = run.rounds > 24 ? rounds.filter((r) => r.repetition === Math.floor(Math.max(0, run.round - 1) / run.frameworks.length)) : rounds;
  const asked = round?.requests ?? [];
  const settled = asked.filter((request) => request.outcome).length;
  keep(
    at("rounds"),
    shown,
    (each) => each.index,
    (each) => make("li", {}, `${each.framework}${run.repetitions > 1 ? ` #${each.repetition + 1}` : ""}`),
    (item, each) => {
      const present = each.index === run.round - 1;
      const isIt = present && round?.framework === each.framework && round?.repetition === each.repetition;
      const done = each.index < run.round - 1 || (present && run.status === "finished") ? 1 : isIt && asked.length ? settled / asked.length : 0;
      mark(item, "aria-current", present && run.status === "running" ? "step" : null);
      item.style.setProperty("--done", done);
    },
  );
  const modelled = run.compute === "native" || !run.compute
    ? ""
    : `Compute time and energy are modelled${run.compute === "mixed" ? " on some nodes" : ""} (${run.emulated_model}); pictures, planning and transfers are measured.`;
  const facts = [
    `${count(run.users, "user")}, ${run.steps} steps${run.slowdown > 1 ? `, ${run.slowdown} times slower than real time` : ""}`,
    run.links ? `links by ${run.links}` : "",
    run.broker,
  ];
  write(at("facts"), `${facts.filter(Boolean).join(" · ")}. ${modelled}`);
  const warnings = [
    run.overruns ? `${count(run.overruns, "overrun")}: this machine is too slow for the hardware that it emulates; raise “slowdown” in the scenario.` : "",
    run.reason,
  ].filter(Boolean);
  at("warning").hidden = !warnings.length;
  write(at("warning"), warnings.join(" "));
  if (round?.round) write(at("said"), `${round.framework}: ${settled} of ${asked.length} users have an answer`);
}

export function drawTable(state) {
  const { table, run, round } = state.view;
  const there = table?.rows.some((row) => row.asked);
  at("table").closest("section").toggleAttribute("hidden", !there);
  if (!there) return;
  const spans = table.measures.map((_, column) => span(table.rows.map((row) => row.values[column])));
  const places = table.measures.map((_, column) => decimals(table.rows.map((row) => row.values[column].mean)));
  keep(
    at("table"),
    ["thead", "tbody"],
    (name) => name,
    (name) => make(name),
    () => {},
  );
  const [head, body] = at("table").children;
  const titles = table.measures.map((m) => `${m.title}${m.unit ? ` (${m.unit})` : ""} ${m.more_is_better ? "↑" : "↓"}`);
  if (head.titles !== titles.join()) {
    head.titles = titles.join();
    head.replaceChildren(make("tr", {}, make("th", { scope: "col" }, "framework"), ...titles.map((t) => make("th", { scope: "col" }, t))));
  }
  keep(
    body,
    table.rows,
    (row) => row.framework,
    (row) => {
      const who = make("small");
      const cells = table.measures.map(() => make("td", {}, make("span.mean"), make("span.std"), make("div.whisker", { "aria-hidden": "true" }, make("i"), make("b"))));
      return Object.assign(make("tr", {}, make("th", { scope: "row" }, row.framework, who), ...cells), { who, fields: cells });
    },
    (line, row) => {
      const running = run?.status === "running" && round?.framework === row.framework;
      mark(line, "aria-current", running ? "true" : null);
      const degraded = row.degraded ? `, ${row.degraded} degraded` : "";
      write(line.who, row.asked ? `${row.answered} of ${row.asked} answered${degraded}` : running ? "running" : "not run yet");
      row.values.forEach((value, column) => drawValue(line.fields[column].children, value, spans[column], places[column]));
    },
  );
}

function drawValue([mean, std, whisker], value, [low, high], places) {
  write(mean, value.mean === null ? "–" : value.mean.toFixed(places));
  mark(mean, "class", `mean ${value.best ? "best" : ""}`);
  mark(mean, "title", value.best ? "best of the frameworks that answered everyone" : null);
  write(std, value.std === null ? "" : `± ${value.std.toFixed(places)}`);
  whisker.hidden = value.mean === null;
  if (value.mean === null) return;
  const at = (x) => `${(100 * (Math.min(high, Math.max(low, x)) - low)) / (high - low)}%`;
  const spread = value.std ?? 0;
  whisker.children[0].style.left = at(value.mean - spread);
  whisker.children[0].style.right = `calc(100% - ${at(value.mean + spread)})`;
  whisker.children[1].style.left = at(value.mean);
}

/** The range that a column's means and spreads take. */
function span(values) {
  const known = values.filter((value) => value.mean !== null);
  const low = Math.min(...known.map((v) => v.mean - (v.std ?? 0)));
  const high = Math.max(...known.map((v) => v.mean + (v.std ?? 0)));
  return high > low ? [low, high] : [low - 1, high + 1];
}

/** Decimal places that give the largest value three significant digits, at most three. */
function decimals(values) {
  const largest = Math.max(...values.map((value) => Math.abs(value ?? 0)));
  return largest > 0 ? Math.min(3, Math.max(0, 2 - Math.floor(Math.log10(largest)))) : 0;
}

export function drawNotes(state) {
  const notes = state.view.notes?.notes ?? [];
  at("notes").closest("section").toggleAttribute("hidden", !notes.length);
  keep(
    at("notes"),
    notes.map((note, index) => ({ ...note, index })).reverse(),
    (note) => `${note.at} ${note.index} ${note.text}`,
    (note) => {
      const time = new Date(1000 * note.at);
      return make(`li.${note.kind}`, {}, make("time", { datetime: time.toISOString() }, time.toLocaleTimeString("en-GB")), make("b", {}, note.kind), make("span", {}, note.text));
    },
    () => {},
  );
}
