"""A device without a model, on plain paho-mqtt and msgpack: it asks for pictures and gets them finished from the edge.

    python examples/thin_client.py --broker 127.0.0.1:18830 --name phone --pictures got/
    python examples/thin_client.py --broker 192.168.1.5:8883 --name phone --credentials phone.json

docs/protocol.md describes every message. Nothing here comes from the testbed's own packages.
"""

import argparse
import json
import socket
import ssl
import threading
import time
from pathlib import Path

import msgpack
from paho.mqtt.client import CallbackAPIVersion, Client


class ThinClient:
    """One place in a testbed. ``run`` returns when the runner says that the run, or the testbed, is over."""

    def __init__(self, broker, name, *, testbed="local", credentials=None, pictures=None):
        self.name, self.pictures, self.asked = name, pictures, {}
        self.topic = f"semct/{testbed}/{name}/"
        self.assigned, self.over = False, threading.Event()
        host, _, port = broker.partition(":")
        self.client = Client(CallbackAPIVersion.VERSION2, client_id=f"{testbed}.{name}")
        if credentials:
            shown = json.loads(Path(credentials).read_text())
            self.client.username_pw_set(shown["name"], shown["password"])
            self.client.tls_set_context(ssl.create_default_context(cadata=shown["ca"]))
        self.client.on_connect = self.connected
        self.client.on_message = self.received
        self.client.will_set(self.topic + "birth", self.birth("lost"), qos=1, retain=True)
        self.address = host, int(port or 1883)

    def run(self):
        """Take the place, serve its user, and leave."""
        while True:
            try:
                self.client.connect(*self.address, keepalive=20)
                break
            except OSError:
                time.sleep(1)  # the testbed is not there yet
        self.client.loop_start()
        self.over.wait()
        self.client.publish(self.topic + "birth", self.birth("gone"), qos=1, retain=True).wait_for_publish(5)
        self.client.disconnect()
        self.client.loop_stop()

    def birth(self, state):
        """Who is here: a device that holds no model."""
        return msgpack.packb(
            {"type": "birth", "name": self.name, "role": "device", "state": state, "host": socket.gethostname()}
        )

    def enrolment(self, state):
        """The wish for the place of this name."""
        wish = {"type": "enrol", "name": self.name, "role": "device", "state": state, "wants": self.name}
        return msgpack.packb(wish)

    def connected(self, client, *_):
        """Also after each reconnection: subscriptions and presence anew."""
        client.subscribe([(self.topic + "control", 1), (self.topic + "work", 1)])
        if self.assigned:
            client.publish(self.topic + "birth", self.birth("ready"), qos=1, retain=True)
        else:
            client.publish(self.topic + "enrol", self.enrolment("ready"), qos=1, retain=True)

    def say(self, what, **message):
        """Publish under this device's own name."""
        self.client.publish(self.topic + what, msgpack.packb(message), qos=1)

    def received(self, _client, _data, packet):
        """One message from the runner (``control``) or an edge (``work``)."""
        now, message = time.time(), msgpack.unpackb(packet.payload)
        match message["type"]:
            case "assign":
                self.assigned = True
                self.client.publish(self.topic + "enrol", self.enrolment("gone"), qos=1, retain=True)
                self.client.publish(self.topic + "birth", self.birth("ready"), qos=1, retain=True)
            case "ping":
                self.say("clock", type="pong", node=self.name, sent=message["sent"], received=now, replied=time.time())
            case "ask":
                self.ask(message, now)
            case "work" if message["request"] in self.asked:
                self.finish(message, now, len(packet.payload))
            case "close" if message.get("round"):
                nothing = {"denoiser_calls": 0, "rows": 0, "flops": 0.0, "busy": 0.0, "joules": 0.0, "overruns": 0}
                self.say("spent", type="spent", round=message["round"], node=self.name, **nothing)
            case "close":
                self.over.set()

    def ask(self, ask, now):
        """Send the user's wish to the edge."""
        kept = ("round", "request", "prompt", "seed", "steps", "deadline")
        self.asked.setdefault(ask["request"], now)
        wish = {key: ask[key] for key in kept}
        self.say("request", type="request", reply=self.name, sent=now, attempt=ask.get("attempt", 0), **wish)

    def finish(self, work, now, size):
        """Report the outcome, and then show the picture."""
        same = {"round": work["round"], "request": work["request"]}
        way = {"name": "transfer", "node": work["sender"], "to": self.name, "start": work["sent"], "stop": now}
        png, reason = work.get("picture"), work.get("failure", "")
        if not png:
            reason = reason or f"{self.name} holds no model"
        outcome = {"outcome": "answered" if png else "failed", "reason": reason}
        stages = [*work.get("stages", []), {**way, "size": size}]
        asked = self.asked.pop(work["request"])
        self.say(
            "result",
            type="result",
            device=self.name,
            asked=asked,
            finished=time.time(),
            stages=stages,
            **same,
            **outcome,
        )
        if png:
            self.say("picture", type="picture", png=png, **same)
            if self.pictures:
                self.pictures.mkdir(parents=True, exist_ok=True)
                (self.pictures / f"{work['request']}.png").write_bytes(png)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", required=True, help="HOST:PORT")
    parser.add_argument("--name", required=True, help="as the scenario's `attached` names the place")
    parser.add_argument("--testbed", default="local")
    parser.add_argument("--credentials", help="a file by `semct enroll`; the broker then is one with TLS")
    parser.add_argument("--pictures", type=Path, help="a folder for the pictures")
    arguments = vars(parser.parse_args())
    ThinClient(arguments.pop("broker"), arguments.pop("name"), **arguments).run()
