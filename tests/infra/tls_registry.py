# SPDX-License-Identifier: Apache-2.0
"""tls_registry.py PORT CERT CA TOKEN: a schema registry that demands a client certificate of CA, and TOKEN.
Refuses every schema, and says in its reason whose certificate it saw and what it thinks of the token."""
import http.server
import json
import ssl
import sys


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        name = dict(x[0] for x in self.connection.getpeercert()["subject"])["commonName"]
        good = self.headers.get("Authorization") == f"Bearer {sys.argv[4]}"
        body = json.dumps({"error_code": 42201, "message": f"{name}'s token is {'good' if good else 'bad'}"})
        self.send_response(422)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=sys.argv[3])
context.load_cert_chain(sys.argv[2])
context.verify_mode = ssl.CERT_REQUIRED
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
