"""A server of the standard library alone that speaks a little of OpenAI's dialect, slow to start."""

import snowdrop as sd

SERVER = """
import http.server, json, sys, time

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_response(200); self.send_header("content-length", "0"); self.end_headers()

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        base = {"id": "x", "created": 1, "model": sys.argv[2]}
        if asked["messages"][-1]["content"] == "die":
            import os; os._exit(3)
        if not asked.get("stream"):
            message = {"role": "assistant", "content": "hello"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self.answer("application/json", json.dumps({**base, "object": "chat.completion", "choices": [choice]}))
            return
        events = []
        for text in ("hel", "lo"):
            choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
            events.append({**base, "object": "chat.completion.chunk", "choices": [choice]})
        usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
        if (asked.get("stream_options") or {}).get("include_usage"):
            events.append({**base, "object": "chat.completion.chunk", "choices": [], "usage": usage})
        lines = [f"data: {json.dumps(event)}\\n\\n" for event in events]
        self.answer("text/event-stream", "".join(lines) + "data: [DONE]\\n\\n")

    def answer(self, kind, text):
        body = text.encode()
        self.send_response(200)
        self.send_header("content-type", kind); self.send_header("content-length", str(len(body)))
        self.end_headers(); self.wfile.write(body)

    def log_message(self, *_):
        print("the server answered", flush=True)

time.sleep(float(sys.argv[3]))
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""

spoken = sd.command(
    ["{python}", "-c", SERVER, "{port}", "{deployment}", "4"],
    openai=["/v1/chat/completions"],
    concurrency=4,
    scale=sd.Scale(min=0, max=1, idle_s=60),
    queue=sd.QueueSpec(progress_first_s=0.2, progress_every_s=0.5),
    resources=sd.ResourceSpec(memory_bytes_max=256 << 20),
)
