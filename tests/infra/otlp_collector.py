# SPDX-License-Identifier: Apache-2.0
"""otlp_collector.py PORT FILE: takes OpenTelemetry spans (OTLP over HTTP, as JSON) on loopback and writes
each of them, with its resource's attributes as "resource", as a line of FILE."""
import http.server
import json
import sys


class Collector(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        good = self.path == "/v1/traces" and self.headers["Content-Type"] == "application/json"
        with open(sys.argv[2], "a", encoding="utf-8") as f:
            for r in json.loads(body)["resourceSpans"] if good else []:
                for s in r["scopeSpans"]:
                    f.writelines(json.dumps({**x, "resource": r["resource"]["attributes"],
                                             "scope": s["scope"]["name"]}) + "\n" for x in s["spans"])
        self.send_response(200 if good else 400)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_):
        pass


http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Collector).serve_forever()
