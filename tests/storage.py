"""A stand-in for Google Cloud Storage in memory: the part of its JSON API that gcsfs and tensorstore speak.

  python -m tests.storage 9023 bucket     then STORAGE_EMULATOR_HOST=TENSORSTORE_GCS_HTTP_URL=http://localhost:9023

Holds: every write makes a new generation, and conditions on generations are kept, which the checkpoints of
  several processes rely on.
"""

import email
import itertools
import json
import re
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Storage(ThreadingHTTPServer):
  """`objects`: {(bucket, name): (generation, bytes)}; `away`: answers 503 to everything while it is set."""

  daemon_threads, request_queue_size = True, 256

  def __init__(self, port, *buckets):
    super().__init__(("localhost", port), Handler)
    self.buckets, self.objects, self.uploads = set(buckets), {}, {}
    self.lock, self.generations, self.away = threading.RLock(), itertools.count(1), False

  def handle_error(self, *_):
    """Clients may hang up."""

  def start(self):
    """Serves in a thread."""
    threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
  """One request."""

  protocol_version = "HTTP/1.1"

  def log_message(self, *_):
    """Says nothing."""

  def handle_request(self):
    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
    if self.server.away:
      return self.answer(503)
    with self.server.lock:
      return self.answer(*self.route(self.command, self.path, body))

  do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = handle_request

  def answer(self, status, body=b"", headers=()):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    self.send_response(status)
    for name, value in {"Content-Length": len(body), **dict(headers)}.items():
      self.send_header(name, str(value))
    self.end_headers()
    self.wfile.write(body)

  def route(self, method, url, body):
    """(status, body, headers) of a request."""
    path, _, query = url.partition("?")
    asked = dict(urllib.parse.parse_qsl(query))
    if path.startswith("/batch/"):
      return self.batch(body)
    match = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.*))?)?/?", path)
    bucket, name = match[2], urllib.parse.unquote(match[3] or "")
    if bucket not in self.server.buckets:
      return 404, {"error": {"code": 404, "message": f"bucket {bucket} does not exist"}}
    if match[1] == "/upload":
      return self.upload(bucket, asked, body)
    if not name:
      return (200, self.listing(bucket, asked)) if "/o" in path else (200, {"name": bucket})
    if copied := re.fullmatch(r"(.*)/(?:rewriteTo|copyTo)/b/([^/]+)/o/(.*)", match[3]):
      source, target = urllib.parse.unquote(copied[1]), urllib.parse.unquote(copied[3])
      meta = self.write(copied[2], target, self.server.objects[bucket, source][1])
      return 200, {"done": True, "resource": meta}
    return self.object(method, bucket, name, asked)

  def object(self, method, bucket, name, asked):
    generation, content = self.server.objects.get((bucket, name), (0, None))
    if status := self.refused(asked, generation):
      return status, b""
    if content is None:
      return 404, {"error": {"code": 404, "message": f"no object {name}"}}
    if method == "DELETE":
      del self.server.objects[bucket, name]
      return 204, b""
    if asked.get("alt") != "media":
      return 200, self.meta(bucket, name)
    headers, size = {"x-goog-generation": generation}, len(content)
    if limits := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
      first = int(limits[1]) if limits[1] else max(0, size - int(limits[2]))
      last = min(int(limits[2]), size - 1) if limits[1] and limits[2] else size - 1
      if first >= size:
        return 416, b"", headers
      headers["Content-Range"] = f"bytes {first}-{last}/{size}"
      return 206, content[first : last + 1], headers
    return 200, content, headers

  def upload(self, bucket, asked, body):
    if "upload_id" in asked:
      return self.resume(asked["upload_id"], body)
    kind, name = asked["uploadType"], asked.get("name")
    if kind == "resumable":
      name = name or json.loads(body)["name"]
      number = str(next(self.server.generations))
      self.server.uploads[number] = [bucket, name, b""]
      where = f"http://{self.headers['Host']}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}"
      return 200, {}, {"Location": where}
    if kind == "multipart":
      head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
      facts, content = email.message_from_bytes(head + body).get_payload()
      name = name or json.loads(facts.get_payload())["name"]
      body = content.get_payload(decode=True)
    generation, _ = self.server.objects.get((bucket, name), (0, None))
    if status := self.refused(asked, generation):
      return status, b""
    return 200, self.write(bucket, name, body)

  def resume(self, number, body):
    upload = self.server.uploads[number]
    upload[2] += body
    if not re.search(
      r"/\d+$", self.headers.get("Content-Range", "/0")
    ):  # the size is not known yet
      return 308, b"", {"Range": f"bytes=0-{len(upload[2]) - 1}"}
    return 200, self.write(*self.server.uploads.pop(number))

  def listing(self, bucket, asked):
    prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter")
    items, prefixes = [], set()
    low, high = asked.get("startOffset", ""), asked.get("endOffset", "\U0010ffff")
    for where, name in sorted(self.server.objects):
      if where != bucket or not name.startswith(prefix) or not low <= name < high:
        continue
      rest = name[len(prefix) :]
      if delimiter and delimiter in rest:
        prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
      else:
        items.append(self.meta(bucket, name))
    return {"items": items, "prefixes": sorted(prefixes)}

  def batch(self, body):
    """Several deletions in one request."""
    mark = b"=" * 8
    done = []
    for part in re.findall(rb"(\w+) (\S*/storage/v1/b/\S+)", body):
      status, *_ = self.route(part[0].decode(), part[1].decode(), b"")
      done.append(b"--%b\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 %d OK\r\n\r\n\r\n" % (mark, status))  # fmt: skip
    headers = {"Content-Type": f"multipart/mixed; boundary={mark.decode()}"}
    return 200, b"".join(done) + b"--%b--" % mark, headers

  def write(self, bucket, name, content):
    self.server.objects[bucket, name] = next(self.server.generations), bytes(content)
    return self.meta(bucket, name)

  def meta(self, bucket, name):
    generation, content = self.server.objects[bucket, name]
    times = dict.fromkeys(("timeCreated", "updated"), "2026-01-01T00:00:00.000Z")
    facts = {"bucket": bucket, "name": name, "size": str(len(content)), "generation": str(generation)}  # fmt: skip
    return {"kind": "storage#object", "id": f"{bucket}/{name}", "metageneration": "1", **facts, **times}  # fmt: skip

  @staticmethod
  def refused(asked, generation):
    """412 or 304 where the generation is not as the request wants it, else 0."""
    if "ifGenerationMatch" in asked and int(asked["ifGenerationMatch"]) != generation:
      return 412
    return 304 if asked.get("ifGenerationNotMatch") == str(generation) else 0


if __name__ == "__main__":
  Storage(int(sys.argv[1]), *sys.argv[2:]).serve_forever()
