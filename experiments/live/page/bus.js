// The way to the broker: MQTT over WebSockets, as a reader.

const parameters = new URLSearchParams(location.search);
const testbed = parameters.get("testbed") ?? "local";
const broker = parameters.get("broker") ?? `${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/mqtt`;

const WAIT = 1500; // ms between two tries to connect
const PACE = 100; // ms at least between two looks at what came: a storm of messages costs no more

/** Hands over the latest message of each topic, `take(name, message)` with the topic's last levels as its name, then
 * `draw()`; no more often than `PACE`. `standing(state)` says "connecting", "connected" or "away". */
export function listen({ take, draw, standing, wanted }) {
  const latest = new Map();
  const root = `semct/${testbed}/`;
  let planned = false;
  let last = 0;

  function look(now) {
    if (now - last < PACE) {
      requestAnimationFrame(look);
      return;
    }
    last = now;
    planned = false;
    const came = [...latest];
    latest.clear();
    for (const [topic, bytes] of came) {
      let message = null;
      try {
        message = MessagePack.decode(bytes);
      } catch {
        continue; // none of ours
      }
      take(topic.slice(root.length), message);
    }
    draw();
  }

  function plan() {
    if (planned) return;
    planned = true;
    requestAnimationFrame(look);
  }

  function connect() {
    standing("connecting");
    const client = new Paho.Client(broker, `viewer-${crypto.getRandomValues(new Uint32Array(2)).join("-")}`);
    client.onMessageArrived = (message) => {
      latest.set(message.destinationName, message.payloadBytes);
      plan();
    };
    client.onConnectionLost = () => away();
    client.connect({
      mqttVersion: 4,
      cleanSession: true,
      keepAliveInterval: 30,
      timeout: 5,
      onSuccess: () => {
        standing("connected");
        client.subscribe(`${root}+/view/+`, { qos: 1 });
        client.subscribe(`${root}+/progress`, { qos: 0 });
      },
      onFailure: () => away(),
    });
  }

  function away() {
    standing("away");
    if (wanted()) setTimeout(connect, WAIT);
  }

  connect();
  return connect;
}
