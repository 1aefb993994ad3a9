# SPDX-License-Identifier: Apache-2.0
"""s3_store.py DIR PORT KEY SECRET: takes PUT and GET of objects below DIR, as an S3 server would.

Every PUT must be signed for region eu-test with AWS Signature Version 4, over all of its x-amz-*
headers, host and content-type, and its body must have the signed hash; else 403, as AWS answers. The
signature is computed here from AWS's description of it, with nothing of the client's library.

DIR/.mode says what else happens, and may change at any time: "ok"; a status, which is the answer to
every PUT; "hang": the body is read and never answered. DIR/.log gets a line for each PUT: wall-clock
milliseconds, status, name; with 200 the object was on disk before.
"""
import hashlib
import hmac
import http.server
import os
import sys
import time

folder, port, key, secret = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
REGION = "eu-test"


def mac(k, text):
    return hmac.new(k, text.encode(), hashlib.sha256).digest()


def signature_fault(h, body):
    """What is wrong with the request's signature; None: nothing."""
    scheme, _, rest = h.headers.get("authorization", "").partition(" ")
    if scheme != "AWS4-HMAC-SHA256":
        return "AccessDenied: not signed"
    part = dict(p.strip().split("=", 1) for p in rest.split(","))
    names, when = part["SignedHeaders"].split(";"), h.headers.get("x-amz-date", "")
    scope = f"{when[:8]}/{REGION}/s3/aws4_request"
    if part["Credential"] != f"{key}/{scope}":
        return "InvalidAccessKeyId, or another region or day"
    if abs(time.time() - time.mktime(time.strptime(when + "UTC", "%Y%m%dT%H%M%SZ%Z"))
           + time.timezone) > 900:
        return "RequestTimeTooSkewed"
    if set(names) - {n.lower() for n in h.headers}:
        return f"SignatureDoesNotMatch: signed, but not sent: {names}"
    must = {"host", "content-type"} | {n.lower() for n in h.headers if n.lower().startswith("x-amz-")}
    if must - set(names):
        return f"AccessDenied: not signed: {must - set(names)}"
    hashed = h.headers.get("x-amz-content-sha256")
    if hashed != hashlib.sha256(body).hexdigest():
        return "XAmzContentSHA256Mismatch"
    path, _, query = h.path.partition("?")
    canonical = "\n".join([h.command, path, query, *(f"{n}:{h.headers[n].strip()}" for n in names), "",
                           ";".join(names), hashed])
    to_sign = "\n".join(["AWS4-HMAC-SHA256", when, scope,
                         hashlib.sha256(canonical.encode()).hexdigest()])
    k = ("AWS4" + secret).encode()
    for step in scope.split("/"):
        k = mac(k, step)
    good = hmac.compare_digest(mac(k, to_sign).hex(), part["Signature"])
    return None if good else "SignatureDoesNotMatch"


class Store(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b""):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        try:
            self.answer(200, open(folder + self.path, "rb").read())
        except OSError:
            self.answer(404)

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        mode = open(folder + "/.mode", encoding="utf-8").read().strip()
        if mode == "hang":
            time.sleep(600)
        fault = signature_fault(self, body)
        status = int(mode) if mode != "ok" else 403 if fault else 200
        if status == 200:
            with open(folder + self.path + ".new", "wb") as f:
                f.write(body)
            os.rename(folder + self.path + ".new", folder + self.path)
        with open(folder + "/.log", "a", encoding="utf-8") as f:
            f.write(f"{int(time.time() * 1000)} {status} {self.path[1:]} {fault or ''}\n")
        self.answer(status, (fault or "").encode())


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True


Server(("127.0.0.1", port), Store).serve_forever()
