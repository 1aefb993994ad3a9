# SPDX-License-Identifier: Apache-2.0
"""token_server.py PORT SECONDS LOG: an OIDC token endpoint. Hands out unsigned tokens that last SECONDS,
for a broker with Kafka's own validator for such; one line a request in LOG."""
import base64
import http.server
import json
import sys
import time


def part(d):
    return base64.urlsafe_b64encode(json.dumps(d).encode()).rstrip(b"=").decode()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        now, lasts = int(time.time()), int(sys.argv[2])
        token = part({"alg": "none"}) + "." + part({"sub": "worker", "iat": now, "exp": now + lasts,
                                                    "scope": "kafka"}) + "."
        body = json.dumps({"access_token": token, "token_type": "Bearer", "expires_in": lasts})
        with open(sys.argv[3], "a", encoding="utf-8") as f:
            print(now, self.headers.get("Authorization", "")[:5], file=f)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
