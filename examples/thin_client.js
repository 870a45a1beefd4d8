// A device without a model in a browser, over WebSockets: examples/thin_client.html?broker=ws://HOST:PORT/mqtt&name=phone
// It does what examples/thin_client.py does; docs/protocol.md describes every message. With wss:// it asks for the file
// of credentials that `semct enroll` made; its authority must be one that the browser trusts.

const options = new URLSearchParams(location.search);
const testbed = options.get("testbed") ?? "local";
const name = options.get("name") ?? "phone";
const broker = options.get("broker") ?? `ws://${location.hostname}:1883/mqtt`;
const root = `semct/${testbed}/${name}/`;

const asked = new Map(); // request -> when its user asked, by this device's clock
let shown = {}; // what the broker wants to know of us
let assigned = false;
let client = null;

const now = () => Date.now() / 1000;

function tell(text) {
  document.querySelector("#state").textContent = text;
}

function payload(message, what, retained) {
  const packet = new Paho.Message(MessagePack.encode(message));
  packet.destinationName = root + what;
  packet.qos = 1;
  packet.retained = retained;
  return packet;
}

const say = (what, message, retained = false) => client.send(payload(message, what, retained));
const birth = (state) => ({ type: "birth", name, role: "device", state, host: location.hostname });
const enrolment = (state) => ({ type: "enrol", name, role: "device", state, wants: name });

function ask(wish, at) {
  if (!asked.has(wish.request)) asked.set(wish.request, at);
  const { round, request, prompt, seed, steps, deadline, attempt = 0 } = wish;
  say("request", {
    type: "request", round, request, attempt, prompt, seed, steps, deadline, reply: name, sent: now(),
  });
  tell(`waiting for ${prompt}`);
}

function finish(work, at, size) {
  const { round, request, picture = null } = work;
  const way = { name: "transfer", node: work.sender, to: name, start: work.sent, stop: at, size };
  say("result", {
    type: "result", round, request, device: name,
    outcome: picture ? "answered" : "failed",
    reason: picture ? "" : work.failure || `${name} holds no model`,
    asked: asked.get(request), finished: now(), stages: [...(work.stages ?? []), way],
  });
  asked.delete(request);
  if (picture === null) return;
  say("picture", { type: "picture", round, request, png: picture });
  const image = document.createElement("img");
  image.src = URL.createObjectURL(new Blob([picture], { type: "image/png" }));
  image.alt = request;
  document.querySelector("#pictures").append(image);
}

function spent(round) {
  const nothing = { denoiser_calls: 0, rows: 0, flops: 0, busy: 0, joules: 0, overruns: 0 };
  say("spent", { type: "spent", round, node: name, ...nothing });
}

function leave() {
  say("birth", birth("gone"), true);
  assigned = null; // do not come back
  tell("over");
  setTimeout(() => client.isConnected() && client.disconnect(), 500);
}

function received(packet) {
  const at = now();
  const message = MessagePack.decode(packet.payloadBytes);
  switch (message.type) {
    case "assign":
      assigned = true;
      say("enrol", enrolment("gone"), true);
      say("birth", birth("ready"), true);
      return tell("in its place");
    case "ping":
      return say("clock", { type: "pong", node: name, sent: message.sent, received: at, replied: now() });
    case "ask":
      return ask(message, at);
    case "work":
      return asked.has(message.request) ? finish(message, at, packet.payloadBytes.length) : undefined;
    case "close":
      return message.round ? spent(message.round) : leave();
  }
}

function connect() {
  client = new Paho.Client(broker, `${testbed}.${name}`);
  client.onMessageArrived = received;
  client.onConnectionLost = again;
  client.connect({
    mqttVersion: 4,
    cleanSession: false,
    keepAliveInterval: 20,
    timeout: 5,
    ...shown,
    willMessage: payload(birth("lost"), "birth", true),
    onFailure: again,
    onSuccess: () => {
      client.subscribe(`${root}control`, { qos: 1 });
      client.subscribe(`${root}work`, { qos: 1 });
      if (assigned) say("birth", birth("ready"), true);
      else say("enrol", enrolment("ready"), true);
      tell("waiting for a place");
    },
  });
}

function again() {
  if (assigned === null) return;
  tell(`${broker} is not there yet`);
  setTimeout(connect, 1000);
}

async function choose(event) {
  const credentials = JSON.parse(await event.target.files[0].text());
  shown = { userName: credentials.name, password: credentials.password };
  connect();
}

const file = document.querySelector("#credentials");
if (broker.startsWith("wss:")) {
  file.hidden = false;
  file.addEventListener("change", choose, { once: true });
} else connect();
