"""A stand-in for an OpenAI-compatible server: answers in a thread of this process, with faults on request."""

import json
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def good_answer(system: str, text: str) -> str:
    """The change depends on the conversation, so that a mix-up of dialogues would show."""
    number = zlib.crc32(text.encode())
    if "Change: one whole number" in system:
        return f"Content: c\nTargetCompletion: t\nActivity: a\nAnalyse: n\nChange: {number % 11 - 5:+d}"
    return f"Thinking: t\nOrigin: o\nChange: c\nResponse: And then it was {number}."


class Stub:
    """`fault(count, system, text)` returns None, a string to answer with, or (status, headers, body, seconds before it)."""

    def __init__(self, fault=lambda count, system, text: None, delay=0.0, schema=True):
        self.fault, self.delay, self.schema = fault, delay, schema
        self.requests, self.headers = [], []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.headers.append({name.lower(): value for name, value in self.headers.items()})
                stub.requests.append(body)
                system, *_, text = (message["content"] for message in body["messages"])
                if "response_format" in body and not stub.schema:
                    return self.send(400, {}, b'{"error": "response_format is not supported"}')
                answer = stub.fault(len(stub.requests), system, text)
                if answer is None:
                    answer = good_answer(system, text)
                time.sleep(stub.delay)
                if isinstance(answer, tuple):
                    status, headers, content, seconds = answer
                    time.sleep(seconds)
                    return self.send(status, headers, content)
                content = json.dumps({"choices": [{"message": {"role": "assistant", "content": answer}}]})
                self.send(200, {}, content.encode())

            def send(self, status, headers, content):
                try:
                    self.send_response(status)
                    usual = {"Content-Length": str(len(content)), "Content-Type": "application/json"}
                    for name, value in (usual | headers).items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    pass  # the client has gone

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128

        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()
