// The requests of the present round, and the clusters that they form.

import { at, count, keep, make, mark, paint, percent, significant, write } from "./dom.js";

/** Where a request is: how many steps are done, what to say of it, and who it is on its way to, if so. */
export function whereabouts(request, progress, steps) {
  if (request.outcome === "failed") return { done: 0, says: "no picture" };
  if (request.outcome) return { done: steps, says: request.outcome === "degraded" ? "degraded" : "done" };
  if (!request.segments.length) {
    return { done: 0, says: request.asks > Date.now() / 1000 ? "not yet asked" : "waits for the plan" };
  }
  const done = progress?.steps ?? request.segments[0].start;
  if (done >= steps) return { done, says: "all steps done" };
  const next = request.segments.find((segment) => segment.stop > done);
  if (progress && next.node !== progress.node) return { done, says: `on its way to ${next.node}`, to: next.node };
  if (!done) return { done, says: `waits at ${next.node}` };
  return { done, says: `${next.node === request.device ? "device" : next.node}: ${done} of ${steps}` };
}

export function drawRequests(state, choose) {
  const round = state.view.round;
  const steps = state.view.run?.steps ?? 28;
  const roles = new Map((state.view.cell?.nodes ?? []).map((node) => [node.name, node.role]));
  const requests = round?.requests ?? [];
  keep(at("requests"), requests, (request) => request.device, create, update);
  at("requests").closest("section").toggleAttribute("hidden", !requests.length);

  function create(request) {
    const piece = {
      who: make("span.who"),
      state: make("span.state"),
      route: make("span.route", { "aria-hidden": "true" }),
      todo: make("b"),
      wish: make("span.wish"),
    };
    const button = make("button", { type: "button", "aria-pressed": "false" }, piece.who, piece.state, piece.route, piece.wish);
    button.addEventListener("click", () => choose(request.device));
    return Object.assign(make("li.card", {}, button), { piece, button });
  }

  function update(card, request) {
    const { piece } = card;
    const { done, says } = whereabouts(request, state.progress.get(request.id), steps);
    paint(card, request.cluster);
    write(piece.who, request.device);
    const seconds = request.outcome && state.pictures.get(request.device)?.shown.get(round.framework)?.latency;
    write(piece.state, seconds ? `${says} · ${significant(seconds)}\u00a0s` : says);
    mark(piece.state, "class", `state ${request.outcome}`);
    write(piece.wish, request.prompt);
    mark(piece.wish, "title", request.prompt);
    mark(card.button, "aria-pressed", state.chosen === request.device);
    if (piece.segments !== request.segments) {
      piece.segments = request.segments;
      piece.route.replaceChildren(...request.segments.map((s) => stretch(s, roles)), piece.todo);
    }
    const left = 1 - done / steps;
    if (piece.left !== left) piece.todo.style.transform = `scaleX(${(piece.left = left).toFixed(3)})`;
  }
}

function stretch(segment, roles) {
  const kind = segment.shared ? "shared" : roles.get(segment.node) === "device" ? "device-part" : "edge";
  const element = make(`i.${kind}`);
  element.style.flexGrow = segment.stop - segment.start;
  return element;
}

export function drawClusters(state) {
  const round = state.view.round;
  const clusters = round?.clusters ?? [];
  const seconds = Object.values(round?.planning ?? {}).reduce((sum, each) => sum + each, 0);
  write(at("planning"), seconds ? `planned in ${significant(seconds)} s` : "");
  const shared = clusters.map((cluster, index) => ({ ...cluster, index })).filter((c) => c.members.length > 1);
  const alone = clusters.length - shared.length;
  const cards = shared.length || !round?.round ? shared : [{ nothing: nothing(round, alone) }];
  keep(
    at("clusters"),
    cards,
    (cluster) => cluster.nothing ?? cluster.index,
    (cluster) => (cluster.nothing ? make("li.nothing", {}, cluster.nothing) : make("li", {}, make("q"), make("p"))),
    (card, cluster) => {
      if (cluster.nothing) return;
      paint(card, cluster.index);
      write(card.children[0], cluster.public_prompt);
      const like = round.requests.filter((r) => r.cluster === cluster.index && r.similarity !== null);
      const mean = like.reduce((sum, r) => sum + r.similarity, 0) / like.length;
      const facts = [
        count(cluster.members.length, "user"),
        like.length ? `similarity ${mean.toFixed(2)}` : "",
        `worded by ${cluster.source}`,
        cluster.share >= 0.001 ? `${percent(cluster.share)} of the edge` : "",
      ];
      write(card.children[1], facts.filter(Boolean).join(" · "));
    },
  );
  at("clusters").closest("section").toggleAttribute("hidden", !round?.round);
}

function nothing(round, alone) {
  if (!round.requests.some((request) => request.segments.length)) return "The plan is not made yet.";
  return `${round.framework} shares no public prompt${alone ? `: ${count(alone, "cluster")} of one user` : ""}.`;
}
