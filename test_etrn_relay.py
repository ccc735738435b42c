#!/usr/bin/env python3
"""Tests of etrn_relay.py.

    python3 test_etrn_relay.py [-k PATTERN] [-v]

Nothing but the standard library, loopback and temporary folders is used, and
every port is one the system gave.  The last line says `N passed, N failed,
N skipped`; the exit status is 0 when none failed.

CONTENTS  1 HARNESS  2 GRAMMAR  3 CONFIG  4 SESSION  5 SMUGGLING  6 SCHEDULE
          7 DNS  8 DSN  9 SPOOL  10 DELIVERY  11 RELAY  12 COMMANDS  13 LAYERS
"""
from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import dataclasses
import email
import email.policy
import errno
import hashlib
import importlib.util
import io
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union
from unittest import mock

import etrn_relay as etrn

HERE = os.path.dirname(os.path.abspath(__file__))
SOURCE = os.path.join(HERE, "etrn_relay.py")
SAMPLE = os.path.join(HERE, "etrn.conf.sample")

# == 1. HARNESS ================================================================
# Clocks, failing disks, scripted primaries and nameservers, and the relay as a
# process.  No test sleeps for luck: wait() polls until something is so.

DEADLINE_S = 20.0               # for anything waited for; reached only by a failing test
DOMAIN = "ourdom.example"
MESSAGE = b"From: <a@sender.example>\r\nSubject: one\r\n\r\nHello.\r\n"


def wait(is_so: Callable[[], Any], what: str = "", seconds: float = DEADLINE_S) -> Any:
    """The first true value of `is_so()`; fails when it never comes."""
    end = time.monotonic() + seconds
    while True:
        value = is_so()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError("waited in vain for %s" % (what or is_so))
        time.sleep(0.005)


def config(text: str = "", domain: str = "", file: str = "/nowhere/etrn.conf") -> etrn.Config:
    """A small configuration: lines for [relay], lines for [domain ourdom.example] and what follows it."""
    return etrn.parse_config("[relay]\nhostname = backup.example.net\n%s\n[domain %s]\n%s\n" % (text, DOMAIN, domain), file)


class Folder(unittest.TestCase):
    """Test cases with a temporary folder of their own."""

    def setUp(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="etrn-test-")
        self.addCleanup(shutil.rmtree, self.folder, True)


def shorten(**seconds: float) -> Any:
    """Other values for constants of section 2, so that no test waits for a real timeout."""
    return mock.patch.multiple(etrn, **seconds)


# -- scripted primaries

HANG, CUT = object(), object()          # answers: never, or the connection closed
Said = Union[str, bytes, object]


class Primary:
    """A scripted SMTP server.  `script` maps a verb ("greeting", "EHLO", "MAIL",
    "RCPT", "DATA", "." for the end of data, ...) to what it says: a text, raw
    bytes, HANG, CUT, a list (one for each use, the last one again and again)
    or a function of the argument that returns one of these.

    It is created down, on a port that stays its own; start() and stop() may
    follow each other.  `messages` are (sender, recipients, data) as accepted."""

    def __init__(self, **script: Any) -> None:
        self.script: Dict[str, Any] = dict(script)
        self.extensions: List[str] = ["PIPELINING", "8BITMIME", "SMTPUTF8", "DSN", "SIZE 1000000"]
        self.messages: List[Tuple[str, List[str], bytes]] = []
        self.log: List[str] = []        # commands as they came
        self.uses: Dict[str, int] = collections.Counter()
        self.clients: List[socket.socket] = []
        self.threads: List[threading.Thread] = []
        self.port = 0
        self.sock = self._bind()
        self.is_up = False

    def _bind(self) -> socket.socket:
        """Bound but not listening, a port refuses connections and stays ours."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", self.port))
        self.port = sock.getsockname()[1]
        return sock

    @property
    def address(self) -> str:
        return "127.0.0.1:%d" % self.port

    def start(self) -> "Primary":
        self.sock.listen(64)
        self.is_up = True
        self._spawn(self._accept, self.sock)
        return self

    def stop(self) -> None:
        """As abruptly as a power cut."""
        self.is_up = False
        for sock in [self.sock, *self.clients]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
        for thread in self.threads:
            thread.join(DEADLINE_S)
        self.clients, self.threads = [], []
        self.sock = self._bind()

    def __enter__(self) -> "Primary":
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()
        self.sock.close()

    def _spawn(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self.threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while self.is_up:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            self.clients.append(sock)
            self._spawn(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        try:
            with sock, sock.makefile("rb") as lines:
                self._talk(sock, lines)
        except (OSError, ValueError):
            pass                        # cut by the script, by stop() or by the client

    def _said(self, verb: str, argument: str, default: str) -> Said:
        said = self.script.get(verb, default)
        if isinstance(said, list):
            said = said[min(self.uses[verb], len(said) - 1)]
        self.uses[verb] += 1
        if callable(said):
            said = said(argument)
        return default if said is None else said

    def _say(self, sock: socket.socket, verb: str, argument: str, default: str) -> str:
        """Answer; returns the first digit."""
        said = self._said(verb, argument, default)
        if said is HANG:
            while sock.recv(65536):
                pass                    # until somebody closes
            raise OSError
        if said is CUT:
            sock.shutdown(socket.SHUT_RDWR)
            raise OSError
        data = said if isinstance(said, bytes) else str(said).replace("\n", "\r\n").encode("utf-8") + b"\r\n"
        sock.sendall(data)
        if data.startswith(b"421"):
            raise OSError
        return data[:1].decode("latin-1")

    def _talk(self, sock: socket.socket, lines: io.BufferedReader) -> None:
        self._say(sock, "greeting", "", "220 primary.example ESMTP")
        sender: Optional[str] = None
        recipients: List[str] = []
        for line in lines:
            text = line.rstrip(b"\r\n").decode("utf-8")
            self.log.append(text)
            verb, _, argument = text.partition(" ")
            verb = verb.upper()
            if verb == "EHLO":
                self._say(sock, verb, argument, "\n".join(
                    ["250-primary.example"] + ["250-" + one for one in self.extensions[:-1]]
                    + ["250 " + (self.extensions or ["HELP"])[-1]]))
            elif verb == "MAIL":
                if self._say(sock, verb, argument, "250 2.1.0 ok") == "2":
                    sender, recipients = argument.partition("<")[2].partition(">")[0], []
            elif verb == "RCPT":
                if sender is None:
                    sock.sendall(b"503 5.5.1 no MAIL\r\n")
                elif self._say(sock, verb, argument, "250 2.1.5 ok") == "2":
                    recipients.append(argument.partition("<")[2].partition(">")[0])
            elif verb == "DATA":
                if not recipients:
                    sock.sendall(b"554 5.5.1 no valid recipients\r\n")
                elif self._say(sock, verb, argument, "354 go on") == "3":
                    stuffed = list(iter(lines.readline, b".\r\n"))
                    if not stuffed or not stuffed[-1]:
                        return          # broke off
                    data = b"".join(one[1:] if one.startswith(b".") else one for one in stuffed)
                    if self._say(sock, ".", argument, "250 2.0.0 taken") == "2":
                        self.messages.append((sender or "", recipients, data))
                    sender, recipients = None, []
            elif verb == "RSET":
                sender, recipients = None, []
                self._say(sock, verb, argument, "250 2.0.0 ok")
            elif verb == "QUIT":
                self._say(sock, verb, argument, "221 2.0.0 bye")
                return
            else:
                self._say(sock, verb, argument, "250 2.0.0 ok" if verb in ("HELO", "NOOP") else "500 5.5.2 what?")


# -- scripted nameservers

def wire_name(name: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode("ascii") for label in name.split(".") if label) + b"\0"


def record(owner: str, kind: int, data: Any) -> bytes:
    """One resource record; data as etrn_relay shows it, an alias as text."""
    if kind in (etrn.A, etrn.AAAA):
        data = socket.inet_pton(socket.AF_INET6 if kind == etrn.AAAA else socket.AF_INET, data)
    elif kind == etrn.MX:
        data = struct.pack("!H", data[0]) + wire_name(data[1])
    elif not isinstance(data, bytes):
        data = wire_name(data)
    return wire_name(owner) + struct.pack("!HHIH", kind, 1, 60, len(data)) + data


def dns_answer(id: int, name: str, kind: int, records: Sequence[bytes] = (), rcode: int = 0, flags: int = 0x8180) -> bytes:
    return (struct.pack("!HHHHHH", id, flags | rcode, 1, len(records), 0, 0) + wire_name(name)
            + struct.pack("!HH", kind, 1) + b"".join(records))


class Dns:
    """A scripted nameserver, UDP and TCP on one port.  `zone` maps (name, kind)
    to records; a name in no key does not exist.  `truncate` sends UDP clients
    to TCP, `mangle` changes each UDP answer (or returns None: silence)."""

    def __init__(self, zone: Dict[Tuple[str, int], List[Any]], truncate: bool = False, rcode: int = 0,
                 mangle: Callable[[bytes], Optional[bytes]] = lambda packet: packet) -> None:
        self.zone, self.truncate, self.rcode, self.mangle = zone, truncate, rcode, mangle
        self.asked: List[Tuple[str, str, int]] = []     # (udp or tcp, name, kind)
        while True:
            self.tcp, self.udp = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self.tcp.bind(("127.0.0.1", 0))
            self.port = self.tcp.getsockname()[1]
            try:
                self.udp.bind(("127.0.0.1", self.port))
                break
            except OSError:             # somebody else has that port for UDP
                self.tcp.close()
                self.udp.close()
        self.tcp.listen(8)
        self.ended, self.end = socket.socketpair()
        self.thread = threading.Thread(target=self._run, daemon=True)

    @property
    def endpoint(self) -> etrn.Endpoint:
        return etrn.Endpoint("127.0.0.1", self.port)

    def __enter__(self) -> "Dns":
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.end.close()
        self.thread.join(DEADLINE_S)
        for sock in (self.tcp, self.udp, self.ended):
            sock.close()

    def _run(self) -> None:
        while True:
            ready = select.select([self.tcp, self.udp, self.ended], [], [])[0]
            if self.ended in ready:
                return
            if self.udp in ready:
                packet, where = self.udp.recvfrom(4096)
                reply = self.mangle(self._reply(packet, "udp"))
                if reply is not None:
                    self.udp.sendto(reply, where)
            else:
                with self.tcp.accept()[0] as sock, sock.makefile("rb") as file:
                    reply = self._reply(file.read(struct.unpack("!H", file.read(2))[0]), "tcp")
                    sock.sendall(struct.pack("!H", len(reply)) + reply)

    def _reply(self, packet: bytes, how: str) -> bytes:
        id, = struct.unpack("!H", packet[:2])
        name, at = etrn.parse_name(packet, 12)
        kind, = struct.unpack("!H", packet[at:at + 2])
        self.asked.append((how, name, kind))
        if self.rcode:
            return dns_answer(id, name, kind, rcode=self.rcode)
        if self.truncate and how == "udp":
            return dns_answer(id, name, kind, flags=0x8380)
        if not any(known == name for known, _ in self.zone):
            return dns_answer(id, name, kind, rcode=etrn.NXDOMAIN)
        return dns_answer(id, name, kind, [record(name, kind, data) for data in self.zone.get((name, kind), [])])


# -- a client of the relay, octet for octet

class Wire:
    """An SMTP client that says exactly what it is told to."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), DEADLINE_S)
        self.lines = self.sock.makefile("rb")
        self.greeting = self.reply()

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        self.lines.close()
        self.sock.close()

    def reply(self) -> str:
        """All lines of a reply; empty when the relay has closed the connection."""
        out = []
        while True:
            line = self.lines.readline().decode("utf-8")
            out.append(line.rstrip("\r\n"))
            if line[3:4] != "-":
                return "\n".join(out)

    def say(self, *commands: str) -> str:
        """Send commands, one after the other; returns the last one's reply."""
        reply = ""
        for command in commands:
            self.sock.sendall(command.encode("utf-8") + b"\r\n")
            reply = self.reply()
        return reply

    def raw(self, data: bytes) -> None:
        self.sock.sendall(data)

    def send(self, data: bytes, sender: str = "a@sender.example", recipients: Sequence[str] = ("user@" + DOMAIN,),
             parameters: str = "") -> str:
        """A whole transaction; returns the reply that settled it."""
        reply = self.say("MAIL FROM:<%s>%s" % (sender, parameters))
        for one in recipients if reply[0] == "2" else ():
            reply = self.say("RCPT TO:<%s>" % one if "<" not in one else "RCPT TO:" + one)
        if reply[0] == "2":
            reply = self.say("DATA")
        if reply[0] == "3":
            self.raw(data.replace(b"\r\n.", b"\r\n..") + b".\r\n")
            reply = self.reply()
        return reply


# -- the relay as a process

CONFIG = """\
[relay]
hostname = backup.example.net
listen = 127.0.0.1:0
min_free_space = 0
nameservers = 127.0.0.1:9
%(relay)s
[bounces]
route = %(smarthost)s
%(bounces)s
[defaults]
recipients = any
cutthrough = no
tls = none
probe_interval = 1s
[domain ourdom.example]
primary = %(primary)s
%(domain)s
"""
# Pauses that serve real outages would only make tests slow; how long they are is tested with a clock that is not real.
QUICK = {"PROBE_FIRST_S": 0.05, "TRIGGER_S": 0.05, "RETRY_DISK_S": 0.2}
STARTER = ("import json, sys; sys.path.insert(0, %r); import etrn_relay; "
           "vars(etrn_relay).update(json.loads(sys.argv[1])); sys.exit(etrn_relay.main(sys.argv[2:]))" % HERE)


class Relay:
    """etrn_relay.py as a process, in a folder of its own.  start() may follow kill() or stop()."""

    def __init__(self, folder: str, primary: str, relay: str = "", domain: str = "", bounces: str = "",
                 smarthost: str = "mx", **limits: float) -> None:
        self.folder = folder
        self.file = os.path.join(folder, "etrn.conf")
        self.spool = os.path.join(folder, "spool")
        self.limits = dict(QUICK, **limits)
        self.values = {"primary": primary, "relay": relay, "domain": domain, "bounces": bounces, "smarthost": smarthost}
        self.write_config()
        self.log: List[str] = []
        self.port = 0
        self.process: Optional[subprocess.Popen[bytes]] = None

    def write_config(self, **values: str) -> None:
        self.values.update(values)
        with open(self.file, "w", encoding="utf-8") as file:
            file.write(CONFIG % self.values)

    def start(self) -> "Relay":
        process = subprocess.Popen([sys.executable, "-c", STARTER, json.dumps(self.limits), "--config", self.file],
                                   stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
        self.process = process
        self.reader = threading.Thread(target=self._read, args=(process, len(self.log)), daemon=True)
        self.reader.start()
        self.port = int(self.logged(r"started: .*listening on 127\.0\.0\.1:(\d+)", len(self.log)).group(1))
        return self

    def _read(self, process: "subprocess.Popen[bytes]", _: int) -> None:
        assert process.stderr is not None
        with process.stderr as lines:
            for line in lines:
                self.log.append(line.decode("utf-8", "replace").rstrip("\n"))

    def logged(self, pattern: str, since: int = 0) -> Any:
        """The match of the first line of the log that has one."""
        def look() -> Any:
            found = next(filter(None, (re.search(pattern, line) for line in self.log[since:])), None)
            if found is None and self.process is not None and self.process.poll() is not None and not self.reader.is_alive():
                raise AssertionError("the relay ended: %s" % "\n".join(self.log[-20:]))
            return found
        return wait(look, "a log line like %r in\n%s" % (pattern, "\n".join(self.log[-20:])))

    def end(self, number: int = signal.SIGTERM) -> int:
        """Stop it with a signal; returns its exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        status = self.process.wait(DEADLINE_S)
        self.reader.join(DEADLINE_S)
        return status

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def __enter__(self) -> "Relay":
        return self.start()

    def __exit__(self, *_: Any) -> None:
        if self.process is not None and self.process.poll() is None:
            self.end(signal.SIGKILL)

    def client(self, hello: str = "EHLO client.example") -> Wire:
        wire = Wire(self.port)
        wire.say(hello)
        return wire

    def send(self, data: bytes = MESSAGE, **envelope: Any) -> str:
        with self.client() as wire:
            return wire.send(data, **envelope)

    def run(self, *arguments: str) -> Tuple[int, str, str]:
        return run("--config", self.file, *arguments)

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json")[1])

    def queue(self) -> List[Dict[str, Any]]:
        rows: List[Dict[str, Any]] = self.json("--queue")
        return rows

    def files(self) -> List[str]:
        """Names of the pairs in the spool, without state, lock and folders."""
        return spool_files(self.spool)

    def is_empty(self) -> bool:
        return not self.files()


def spool_files(folder: str) -> List[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith((".eml", ".json")) and name != "state.json")


def run(*arguments: str) -> Tuple[int, str, str]:
    """The command line in this process: exit status, output, errors."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(sys, "stdin", io.StringIO()):
        code = etrn.main(arguments)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("utf-8"))      # type: ignore[attr-defined]
    return code, texts[0], texts[1]


# == 2. GRAMMAR ================================================================

def cases(test: unittest.TestCase, table: Iterable[Any]) -> Iterator[Any]:
    """Rows of a table; a failure names the row it happened at, and an empty table is one."""
    rows = list(table)
    test.assertTrue(rows)
    for row in rows:
        test.row = row                  # type: ignore[attr-defined]
        yield row
    del test.row                        # type: ignore[attr-defined]


class Grammar(unittest.TestCase):
    def test_domains_become_lower_case_a_labels(self) -> None:
        for text, name in cases(self, [
                ("Example.COM", "example.com"), ("a", "a"), ("x-1.example", "x-1.example"), ("1.2.example", "1.2.example"),
                ("_dmarc.example", "_dmarc.example"), ("münchen.example", "xn--mnchen-3ya.example"),
                ("xn--mnchen-3ya.example", "xn--mnchen-3ya.example"), ("a" * 63 + ".example", "a" * 63 + ".example")]):
            self.assertEqual(etrn.parse_domain(text), name)

    def test_what_is_no_domain_is_refused(self) -> None:
        for text in cases(self, [
                "", ".", "a..b", ".a", "a.", "-a.example", "a-.example", "a" * 64 + ".example", "a." * 127 + "aa", "a b",
                "a\0b", "a\tb", "192.0.2.1", "a.1", "*", "@", "#q", "../x", "%2e", "a/b", "xn---", "xn--a-ecp.ru\n", "x\n",
                "a" * 10000, "\u202eb.example", "[192.0.2.1]"]):
            self.assertRaises(ValueError, etrn.parse_domain, text)

    def test_paths_are_taken_apart(self) -> None:
        for text, local, domain, rest in cases(self, [
                ("<>", "", "", ""), ("<a@b.example>", "a", "b.example", ""), ("<A@B.Example> SIZE=1", "A", "b.example", " SIZE=1"),
                ("<postmaster>", "postmaster", "", ""), ('<"Fred Bloggs"@d.example>', '"Fred Bloggs"', "d.example", ""),
                ('<""@d.example>', '""', "d.example", ""), (r'<"a\"b"@d.example>', r'"a\"b"', "d.example", ""),
                ('<"Abc@def"@d.example>', '"Abc@def"', "d.example", ""), ("<a+b@d.example>", "a+b", "d.example", ""),
                ("<customer/department=shipping@d.example>", "customer/department=shipping", "d.example", ""),
                ("<!def!xyz%abc@d.example>", "!def!xyz%abc", "d.example", ""), ("<u@[127.0.0.1]>", "u", "[127.0.0.1]", ""),
                ("<u@[IPv6:::1]>", "u", "[IPv6:::1]", ""), ("<@r1.example,@r2.example:u@d.example>", "u", "d.example", ""),
                ("<%s@d.example>" % ("x" * 64), "x" * 64, "d.example", ""), ("<é@d.example>", "é", "d.example", "")]):
            path, left = etrn.parse_path(text, "5.1.3")
            self.assertEqual((path.local, path.domain, left), (local, domain, rest))

    def test_what_is_no_path_is_refused_with_501(self) -> None:
        for text in cases(self, [
                "", "a@b.example", "<", ">", "><", "<@d.example>", "<u@>", "<a b@d.example>", "<x y>", "a b c", "a @ b", "<a@b.example",
                "<a@b.example>x", "<a@b.example>NOTIFY=NEVER", "<u@a.example@b.example>", "<.a@d.example>", "<a.@d.example>",
                "<a..b@d.example>", "<u@d.example.>", "<u@d..example>", "<u@-d.example>", "<u@[127.0.0.256]>", "<u@[1.2.3]>",
                "<u@[IPv6:1]>", "<u@[]>", "<a@xn--->", "<%s@d.example>" % ("x" * 65), "<%s@d.example>" % ("é" * 33),
                "<u@%s.example>" % ".".join(["d" * 60] * 5), "<%s@%s>" % ("a" * 75, "b" * 75), "<u@" + "d." * 500 + "d>", '<"a@d.example>',
                '<a"b@d.example>', "<a\0@d.example>", '<"a\nb"@d.example>', "<@r.example:>", "<@r..example:u@d.example>",
                "<(c)a@d.example>", "<$(id)@d.example>", "<../../etc/x@d.example>", "<u@d.example\t>", "<\u202ea b@d.example>"]):
            with self.assertRaises(etrn.Refuse) as caught:
                etrn.parse_path(text, "5.1.7")
            self.assertEqual(caught.exception.reply.code, 501)

    def test_a_path_that_could_be_rerouted_is_known_as_such(self) -> None:
        for text, expected in cases(self, [
                ("<u@d.example>", False), ("<u%o.example@d.example>", True), ("<o.example!u@d.example>", True),
                ("<@d.example:u@d.example>", True), ('<"u@o.example"@d.example>', True), ("<u@[192.0.2.1]>", True),
                ("<|cmd@d.example>", False), ("<-oX@d.example>", False)]):
            self.assertEqual(etrn.parse_path(text, "5.1.3")[0].is_rerouting, expected)

    def test_xtext_passes_as_it_came(self) -> None:
        for text in cases(self, ["abc", "a+2Bb", "QQ314159", "+00"]):
            self.assertEqual(etrn.parse_xtext(text, 100), text)
        for text in cases(self, [None, "", "a b", "a=b", "a+2b", "a+", "a+2", "é", "a\x7f", "x" * 101]):
            self.assertRaises(etrn.Refuse, etrn.parse_xtext, text, 100)
        self.assertEqual(etrn.decode_xtext("a+2Bb+3D"), "a+b=")

    def test_notify_and_orcpt_follow_rfc_3461(self) -> None:
        for text, value in cases(self, [("never", "NEVER"), ("SUCCESS,failure", "SUCCESS,FAILURE"), ("DELAY", "DELAY")]):
            self.assertEqual(etrn.parse_notify(text), value)
        for text in cases(self, [None, "", "NEVER,DELAY", "FAILURE,FAILURE", "SOMETIMES", ","]):
            self.assertRaises(etrn.Refuse, etrn.parse_notify, text)
        for text in cases(self, ["rfc822;a@b.example", "x400;a+20b", "utf-8;\\x{E9}@b.example"]):
            self.assertEqual(etrn.parse_orcpt(text), text)
        for text in cases(self, [None, "", "rfc822", "rfc822;", ";a@b", "rfc 822;a", "rfc822;a b", "rfc822;" + "a" * 501]):
            self.assertRaises(etrn.Refuse, etrn.parse_orcpt, text)

    def test_parameters_come_once_and_in_form(self) -> None:
        self.assertEqual(etrn.parse_parameters(" size=10 SMTPUTF8 X-A=b"), {"SIZE": "10", "SMTPUTF8": None, "X-A": "b"})
        for text in cases(self, ["SIZE=", "SIZE=1 SIZE=2", "#$%=!@#", "=1", "SIZE = 1", "A==1", "A=\x7f"]):
            self.assertRaises(etrn.Refuse, etrn.parse_parameters, text)

    def test_durations_and_sizes_are_parsed_and_shown(self) -> None:
        for text, seconds in cases(self, [("30s", 30), ("5m", 300), ("4h", 14400), ("7d", 604800), ("2w", 1209600), ("90", 90),
                                          ("1.5H", 5400), ("0", 0)]):
            self.assertEqual(etrn.KINDS["duration"](text), seconds)
        for text in cases(self, ["", "s", "5 minutes", "-1", "1e3", "5x"]):
            self.assertRaises(ValueError, etrn.KINDS["duration"], text)
        for text, octets in cases(self, [("512K", 524288), ("50M", 52428800), ("1g", 1 << 30), ("7", 7), ("0", 0)]):
            self.assertEqual(etrn.KINDS["size"](text), octets)
        for text in cases(self, ["", "K", "1.5M", "-1", "1T", "1KB"]):
            self.assertRaises(ValueError, etrn.KINDS["size"], text)
        for seconds, text in cases(self, [(0, "0s"), (59, "59s"), (60, "1m"), (8040, "2h14m"), (86400 * 6 + 3 * 3600 + 5, "6d3h"),
                                          (-1, "0s"), (3601, "1h")]):
            self.assertEqual(etrn.format_duration(seconds), text)
        for octets, text in cases(self, [(0, "0B"), (1023, "1023B"), (1024, "1.0K"), (20480, "20K"), (52428800, "50M"), (1 << 31, "2.0G")]):
            self.assertEqual(etrn.format_size(octets), text)

    def test_names_match_whole_or_on_a_dot_boundary(self) -> None:
        for name, parent, expected in cases(self, [
                ("example.com", "example.com", True), ("a.example.com", "example.com", True), ("badexample.com", "example.com", False),
                ("example.com", "a.example.com", False), ("example.com.evil", "example.com", False)]):
            self.assertEqual(etrn.is_below(name, parent), expected)

    def test_foreign_text_is_one_printable_line(self) -> None:
        for text in cases(self, ["a\r\nb", "a\x1b[2Jb", "\u202e\u2066", "\0", "a\u2028b", "x" * 9999, "\udcff"]):
            shown = etrn.printable(text)
            self.assertTrue(shown.isprintable() and len(shown.splitlines()) == 1 and len(shown) < 1000, shown)

    def test_an_ipv6_client_is_its_64_bit_network(self) -> None:
        self.assertEqual(etrn.client_network("2001:db8::1"), etrn.client_network("2001:db8::ffff:2"))
        self.assertNotEqual(etrn.client_network("2001:db8::1"), etrn.client_network("2001:db8:0:1::1"))
        self.assertEqual(etrn.client_network("192.0.2.1"), "192.0.2.1")
        self.assertEqual(etrn.client_network("fe80::1%eth0"), etrn.client_network("fe80::2"))

    def test_a_reply_of_several_lines_keeps_its_status_on_each(self) -> None:
        self.assertEqual(etrn.Reply(550, "5.1.1", "no\nnot here").wire(), b"550-5.1.1 no\r\n550 5.1.1 not here\r\n")
        self.assertEqual(etrn.Reply(220, "", "hello").wire(), b"220 hello\r\n")


# == 3. CONFIG =================================================================

class Configuration(Folder):
    def error(self, text: str) -> str:
        with self.assertRaises(etrn.ConfigError) as caught:
            etrn.parse_config(text, "etrn.conf")
        return str(caught.exception)

    def test_each_fault_is_told_with_file_and_line(self) -> None:
        for text, expected in cases(self, [
                ("[relay]\nrelay_domain = a.example\n", "etrn.conf:2: unknown option 'relay_domain' (did you mean 'domains'?)"),
                ("[relay]\n\n# x\nhostnam = a\n", "etrn.conf:4: unknown option 'hostnam' (did you mean 'hostname'?)"),
                ("[relay]\nzzz = 1\n", "etrn.conf:2: unknown option 'zzz'"),
                ("[domain a.example]\nlisten = 25\n", "etrn.conf:2: unknown option 'listen'"),
                ("[relais]\n", "etrn.conf:1: unknown section [relais] (did you mean 'relay'?)"),
                ("[relay]\n[relay]\n", "etrn.conf:2: section [relay] is there twice"),
                ("[domain a.example]\n[domain A.Example]\n", "etrn.conf:2: domain a.example is there twice"),
                ("[relay]\nlisten = 25\nlisten = 26\n", "etrn.conf:3: option 'listen' is there twice"),
                ("[relay]\nLISTEN = 25\nlisten = 26\n", "etrn.conf:3: option 'listen' is there twice"),
                ("listen = 25\n", "etrn.conf:1: an option before the first [section]"),
                ("[relay]\nlisten\n", "etrn.conf:2: neither [section], option = value, nor a comment"),
                ("[domain ex ample]\n", "etrn.conf:1: [domain ex ample]: 'ex ample' is not a domain"),
                ("[relay]\nmax_recipients = 0\n", "etrn.conf:2: max_recipients: '0' is out of range (1 to 50000)"),
                ("[relay]\nmax_recipients = many\n", "etrn.conf:2: max_recipients: 'many' is not a whole number"),
                ("[relay]\nmax_message_size = 5X\n", "etrn.conf:2: max_message_size: '5X' is not a size"),
                ("[relay]\ncommand_timeout = 2h\n", "etrn.conf:2: command_timeout: '2h' is out of range (1s to 1h)"),
                ("[relay]\ncommand_timeout = soon\n", "etrn.conf:2: command_timeout: 'soon' is not a duration"),
                ("[relay]\nlog_level = loud\n", "etrn.conf:2: log_level: 'loud' is not one of: debug, info"),
                ("[relay]\nlisten = mail.example:25\n", "etrn.conf:2: listen: 'mail.example:25' is not an address of this machine"),
                ("[relay]\nlisten = 127.0.0.1:70000\n", "etrn.conf:2: listen: '127.0.0.1:70000': there is no port 70000"),
                ("[relay]\nhostname = a_b c\n", "etrn.conf:2: hostname: 'a_b c' is not a host name"),
                ("[relay]\ntrusted_clients = 192.0.2.1/24\n", "etrn.conf:2: trusted_clients: "),
                ("[relay]\nnameservers = dns.example\n", "etrn.conf:2: nameservers: 'dns.example' is not the address"),
                ("[relay]\nbare_newline = keep\n", "etrn.conf:2: bare_newline: 'keep' is not one of: normalize, reject"),
                ("[relay]\ndomains = a..b\n", "etrn.conf:2: domains: 'a..b' is not a domain"),
                ("[relay]\nhostname =\n\nmax_recipients =\n", "etrn.conf:4: max_recipients: is empty"),
                ("[domain a.example]\nprimary = [192.0.2.1:25\n", "etrn.conf:2: primary: '[192.0.2.1:25' is not a host"),
                ("[domain a.example]\netrn = 10.0.0.0/40\n", "etrn.conf:2: etrn: "),
                ("[domain a.example]\nrecipients = bob\n", "etrn.conf:2: recipients: 'bob' is not an address"),
                ("[domain a.example]\ntls = sha256:abc\n", "etrn.conf:2: tls: 'sha256:abc' is not one of"),
                ("[domain a.example]\ncutthrough = maybe\n", "etrn.conf:2: cutthrough: 'maybe' is neither yes nor no"),
                ("[domain a.example]\nretry_interval = 1h\nmax_retry_interval = 1m\n",
                 "etrn.conf:3: max_retry_interval is smaller than retry_interval"),
                ("[bounces]\npostmaster = me\n", "etrn.conf:2: postmaster: 'me' is not a mail address")]):
            self.assertTrue(self.error(text).startswith(expected), self.error(text))

    def test_an_option_whose_feature_is_to_come_is_refused_not_ignored(self) -> None:
        with mock.patch.object(etrn, "OPTIONS", tuple(
                one._replace(built=()) if one.name == "connections" else one for one in etrn.OPTIONS)):
            self.assertTrue(self.error("[domain a.example]\nconnections = 3\n").startswith(
                "etrn.conf:2: connections = 3: not built yet"))

    def test_values_reach_their_domain_by_defaults_and_sections(self) -> None:
        cfg = etrn.parse_config(
            "[relay]\ndomains = plain.example, .wild.example\n[defaults]\nlifetime = 2d\n"
            "[domain own.example]\nlifetime = 1h\nprimary = mail.own.example:26, [2001:db8::1]:27 192.0.2.1\n", "/x/etrn.conf")
        self.assertEqual([cfg.domain(name).lifetime for name in ("plain.example", "own.example", "a.wild.example")],
                         [172800, 3600, 172800])
        self.assertEqual(cfg.domain("own.example").primary, (
            ("mail.own.example", 26), ("2001:db8::1", 27), ("192.0.2.1", 25)))
        for name in cases(self, ["wild.example", "a.own.example", "xown.example", "example", ""]):
            self.assertIsNone(cfg.domain(name))
        self.assertEqual(cfg.domain("b.a.wild.example").name, ".wild.example")
        self.assertEqual(cfg.first_domain, "plain.example")

    def test_defaults_are_those_of_the_manual(self) -> None:
        cfg = config()
        for name, value in cases(self, [
                ("max_message_size", 50 << 20), ("max_recipients", 1000), ("min_free_space", 100 << 20), ("max_connections", 1000),
                ("max_connections_per_client", 50), ("command_timeout", 300), ("bare_newline", "normalize"), ("log", "stderr"),
                ("spool", "/nowhere/spool"), ("bounces_route", "mx"), ("listen", (("0.0.0.0", 25), ("::", 25)))]):
            self.assertEqual(getattr(cfg, name), value)
        for name, value in cases(self, [
                ("primary", "mx"), ("lifetime", 604800), ("etrn", "any"), ("connections", 10), ("probe_interval", 5),
                ("retry_interval", 300), ("max_retry_interval", 3600), ("recovery_grace", 3600), ("max_queue_size", None)]):
            self.assertEqual(getattr(cfg.domain(DOMAIN), name), value)

    def test_comments_stand_behind_values_too(self) -> None:
        cfg = etrn.parse_config("[relay] ; here\n# and\n; there\nmax_recipients = 7   # few\nspool = a #1\n", "/x/etrn.conf")
        self.assertEqual((cfg.max_recipients, cfg.spool), (7, "/x/a #1"))

    def test_a_bare_port_means_all_addresses(self) -> None:
        self.assertEqual(config("listen = 2525").listen, (("0.0.0.0", 2525), ("::", 2525)))
        self.assertEqual(config("listen = localhost:26").listen, (("127.0.0.1", 26), ("::1", 26)))

    def test_etrn_conf_sample_is_what_the_table_makes_and_parses(self) -> None:
        with open(SAMPLE, encoding="utf-8") as file:
            text = file.read()
        self.assertEqual(text, etrn.format_sample())
        cfg = etrn.parse_config(text, "/x/etrn.conf")
        self.assertEqual((cfg.listen, list(cfg.domains)), ((("127.0.0.1", 2525),), ["example.com"]))

    def test_every_default_in_the_table_is_a_value_its_option_takes(self) -> None:
        for option in cases(self, [one for one in etrn.OPTIONS if one.default]):
            value = etrn.KINDS[option.kind](option.default)
            if type(value) in (int, float):
                self.assertTrue(option.low <= value <= option.high)

    def test_a_file_that_is_not_utf8_is_told_with_its_line(self) -> None:
        file = os.path.join(self.folder, "etrn.conf")
        with open(file, "wb") as stream:
            stream.write(b"[relay]\n# caf\xe9\n")
        self.assertEqual(run("--config", file, "--status"), (78, "", "%s:2: not UTF-8\n" % file))


# == 4. SESSION ================================================================
# Dialogues run whole, octet by octet and cut at random; the actions must be
# the same each time.  Only codes are compared, and enhanced codes where given.

class Player:
    """Stands in for the server: answers what a session asks, and keeps its
    actions with neighbours joined.  What was discarded leaves no trace."""

    def __init__(self, session: etrn.Session, answers: Optional[Dict[str, Any]] = None) -> None:
        self.session = session
        self.answers = dict({"mail": None, "rcpt": None, "commit": etrn.Reply(250, "2.0.0", "queued"),
                             "etrn": etrn.Reply(250, "2.0.0", "started")}, **(answers or {}))
        self.actions: List[Tuple[str, Any]] = []
        self.bodies: List[bytes] = []           # of committed messages
        self.body = b""
        self.largest = 0
        self.take(session.greet())

    def receive(self, data: bytes) -> None:
        self.take(self.session.receive(data))

    def take(self, actions: List[Any]) -> None:
        todo = collections.deque(actions)
        while todo:
            action = todo.popleft()
            if isinstance(action, etrn.Body):
                self.body += action.data
                self.largest = max(self.largest, len(action.data))
            elif isinstance(action, etrn.Discard):
                self.body = b""
                self.add("discard", None)
            elif isinstance(action, etrn.Send):
                if self.actions and self.actions[-1][0] == "send":
                    action = etrn.Send(self.actions.pop()[1] + action.data)
                self.add("send", action.data)
            elif isinstance(action, etrn.Ask):
                self.add(action.what, self.shown(action.value))
                if action.what == "commit":
                    self.bodies.append(self.body)
                    self.body = b""
                todo.extendleft(reversed(self.session.resume(self.answers[action.what])))
            else:
                self.add(type(action).__name__.lower(), tuple(action))

    def shown(self, value: Any) -> Any:
        if not isinstance(value, etrn.Transaction):
            return value
        return (value.sender, tuple(one.address for one in value.recipients), value.size, value.body, value.smtputf8, self.body)

    def add(self, what: str, value: Any) -> None:
        self.actions.append((what, value))

    @property
    def replies(self) -> List[str]:
        """The last line of each reply."""
        text = b"".join(data for what, data in self.actions if what == "send").decode("utf-8")
        return [line for line in text.split("\r\n") if line and line[3:4] == " "]

    @property
    def is_closed(self) -> bool:
        return any(what == "close" for what, _ in self.actions)

    def count(self, what: str) -> int:
        return sum(kind == what for kind, _ in self.actions)


DIALOGUE_DOMAINS = "[domain .wild.example]\n[domain xn--mnchen-3ya.example]\n"


def new_session(size_limit: int = 0, **relay: Any) -> etrn.Session:
    cfg = config("\n".join("%s = %s" % pair for pair in relay.items()), DIALOGUE_DOMAINS)
    return etrn.Session(etrn.Door(cfg, size_limit), "192.0.2.7")


def play(data: bytes, cuts: Iterable[int] = (), answers: Optional[Dict[str, Any]] = None, **options: Any) -> Player:
    """A session that was sent `data` in the pieces that `cuts` make."""
    player = Player(new_session(**options), answers)
    bounds = [0, *sorted(cuts), len(data)]
    for start, end in zip(bounds, bounds[1:]):
        if start < end:
            player.receive(data[start:end])
    return player


def play_all_ways(test: unittest.TestCase, data: bytes, **options: Any) -> Player:
    """Whole, octet by octet, and cut at random: one and the same."""
    whole = play(data, **options)
    chance = random.Random(len(data))
    ways = [range(len(data))] if len(data) < 20000 else []
    ways += [chance.sample(range(len(data) + 1), min(len(data), count)) for count in (1, 2, 5, 20)]
    for cuts in ways:
        test.assertEqual(play(data, cuts, **options).actions, whole.actions)
    return whole


class Dialogues(unittest.TestCase):
    """Filled by script()."""


def script(name: str, text: str, **options: Any) -> None:
    """A dialogue: `C:` a line sent, `R:` octets without a line end, `S:` the code
    (and enhanced code) answered, `S: 421 close` when the session ends with it.
    Backslash escapes as in Python.  `bodies` are the messages it commits."""
    bodies = options.pop("bodies", None)
    sent, expected = b"", []
    for kind, part in re.findall(r"\b([CRS]): ?(.*?)(?=\s+[CRS]: |\s*$)", text, re.M):
        if kind == "S":
            expected.append(part)
        else:
            sent += part.encode("utf-8").decode("unicode_escape").encode("latin-1") + (b"\r\n" if kind == "C" else b"")

    def test(self: unittest.TestCase) -> None:
        player = play_all_ways(self, sent, **options)
        got = [reply[:len(want.replace(" close", ""))] for reply, want in zip(player.replies, expected)]
        self.assertEqual((got, len(player.replies)), ([want.replace(" close", "") for want in expected], len(expected)),
                         player.replies)
        self.assertEqual(player.is_closed, expected[-1].endswith(" close"))
        if bodies is not None:
            self.assertEqual(player.bodies, bodies)
    test.__name__ = "test_" + re.sub(r"\W+", "_", name)
    assert not hasattr(Dialogues, test.__name__), name
    setattr(Dialogues, test.__name__, test)


READY = r"""S: 220
    C: EHLO client.example                      S: 250
    """
MAIL = READY + r"""C: MAIL FROM:<a@sender.example>      S: 250 2.1.0
    """
RCPT = MAIL + r"""C: RCPT TO:<u@ourdom.example>         S: 250 2.1.5
    """
DATA = RCPT + r"""C: DATA                               S: 354
    """

script("greetings", r"""S: 220
    C: HELO                     S: 501 5.5.4
    C: EHLO                     S: 501 5.5.4
    C: HELO a                   S: 250
    C: HELO b                   S: 250
    C: EHLO c                   S: 250
    C: helo [192.0.2.1]         S: 250""")
script("commands that are always legal", r"""S: 220
    C: NOOP                     S: 250
    C: NOOP ok                  S: 250
    C: HELP                     S: 214
    C: RSET                     S: 250
    C: RSET FOO                 S: 250
    C: VRFY a@b                 S: 252
    C: VRFY                     S: 501 5.5.4
    C: EXPN list                S: 502 5.5.1
    C: QUIT                     S: 221 2.0.0 close""")
script("quit ignores its argument", r"""S: 220
    C: QUIT oops                S: 221 close""")
script("nothing is answered after quit", r"""S: 220
    C: QUIT                     S: 221 close
    C: NOOP
    C: EHLO x""")
script("a transaction before helo is refused", r"""S: 220
    C: MAIL FROM:<a@b.example>  S: 503 5.5.1
    C: RCPT TO:<u@ourdom.example>   S: 503 5.5.1
    C: DATA                     S: 503 5.5.1
    C: ETRN ourdom.example      S: 503 5.5.1
    C: NOOP                     S: 250""")
script("a whole message after helo", r"""S: 220
    C: HELO old.example         S: 250
    C: MAIL FROM:<a@b.example>  S: 250 2.1.0
    C: RCPT TO:<u@ourdom.example>   S: 250 2.1.5
    C: DATA                     S: 354
    C: Subject: x
    C:
    C: text
    C: .                        S: 250 2.0.0
    C: QUIT                     S: 221 close""", bodies=[b"Subject: x\r\n\r\ntext\r\n"])
script("several messages in one session", DATA + r"""C: one
    C: .                        S: 250 2.0.0
    C: MAIL FROM:<>             S: 250 2.1.0
    C: RCPT TO:<u@a.wild.example>   S: 250 2.1.5
    C: DATA                     S: 354
    C: two
    C: .                        S: 250 2.0.0""", bodies=[b"one\r\n", b"two\r\n"])
script("mail syntax", READY + r"""
    C: MAIL                     S: 501 5.5.4
    C: MAIL <a@b.example>       S: 501 5.5.4
    C: MAIL FROM:               S: 501 5.1.7
    C: MAIL LALA: <>            S: 501 5.5.4
    C: MAIL FROM: Anne <a@b.example>    S: 501 5.1.7
    C: MAIL FROM:<@d.example>   S: 501 5.1.7
    C: MAIL FROM:<local>        S: 501 5.1.7
    C: MAIL FROM:<a@b.example>FOO   S: 501 5.5.4
    C: MAIL FROM: <>            S: 250 2.1.0""")
script("mail after ehlo takes extra blanks and lower case", READY + r"""
    C: \x20 mail  from:  <a@b.example>   size=100  \x20      S: 250 2.1.0""")
script("size parameters", READY + r"""
    C: MAIL FROM:<> SIZE 1000           S: 501 5.5.4
    C: MAIL FROM:<> SIZE                S: 501 5.5.4
    C: MAIL FROM:<> SIZE=abc            S: 501 5.5.4
    C: MAIL FROM:<> SIZE=-1             S: 501 5.5.4
    C: MAIL FROM:<> SIZE = 1            S: 501 5.5.4
    C: MAIL FROM:<> SIZE=10001          S: 552 5.3.4
    C: MAIL FROM:<> SIZE=99999999999999999999       S: 552 5.3.4
    C: MAIL FROM:<> SIZE=10000          S: 250 2.1.0""", size_limit=10000)
script("other mail parameters", READY + r"""
    C: MAIL FROM:<> #$%=!@#             S: 501 5.5.4
    C: MAIL FROM:<> FOO=BAR             S: 555 5.5.4
    C: MAIL FROM:<> BODY=FOOBAR         S: 501 5.5.4
    C: MAIL FROM:<> BODY 9BIT           S: 5
    C: MAIL FROM:<> SMTPUTF8=YES        S: 501 5.5.4
    C: MAIL FROM:<> RET=ALL             S: 501 5.5.4
    C: MAIL FROM:<> ENVID=a=b           S: 501 5.5.4
    C: MAIL FROM:<> BODY=7BIT BODY=7BIT     S: 501 5.5.4
    C: MAIL FROM:<> AUTH=<>             S: 5
    C: MAIL FROM:<> BODY=8bitmime SMTPUTF8 RET=hdrs ENVID=QQ+2B1 SIZE=1    S: 250 2.1.0""")
script("a second mail is out of order", MAIL + r"""
    C: MAIL FROM:<b@c.example>          S: 503 5.5.1
    C: RCPT TO:<u@ourdom.example>       S: 250
    C: MAIL FROM:<b@c.example>          S: 503 5.5.1""")
script("senders may be any valid path", READY + "".join("C: MAIL FROM:%s S: 250 2.1.0\n C: RSET S: 250\n" % path for path in (
    '<""@d.example>', '<"Fred Bloggs"@d.example>', '<"Abc@def"@d.example>', "<a+b@d.example>", "<!def!xyz%abc@d.example>",
    "<u@[127.0.0.1]>", "<u@[IPv6:::1]>", "<@r1.example,@r2.example:u@d.example>", "<a_b@d_e.example>")))
script("bytes outside ascii need smtputf8", READY + r"""
    C: MAIL FROM:<\xc3\xa9@d.example>           S: 553 5.6.7
    C: MAIL FROM:<\xff@d.example> SMTPUTF8      S: 501
    C: MAIL FROM:<\xc3\xa9@d.example> SMTPUTF8  S: 250
    C: RCPT TO:<\xc3\xa9@ourdom.example>        S: 250
    C: RSET                                     S: 250
    C: MAIL FROM:<a@d.example>                  S: 250
    C: RCPT TO:<\xc3\xa9@ourdom.example>        S: 553 5.6.7
    C: RCPT TO:<henry\xe2\x85\xa3@ourdom.example>   S: 553 5.6.7""")
script("rcpt syntax", MAIL + r"""
    C: RCPT                     S: 501 5.5.4
    C: RCPT <u@ourdom.example>  S: 501 5.5.4
    C: RCPT TO:                 S: 501 5.1.3
    C: RCPT TO:bart <u@ourdom.example>      S: 501 5.1.3
    C: RCPT LALA:               S: 501 5.5.4
    C: RCPT TO:<>               S: 501 5.1.3
    C: RCPT TO:<bart>           S: 501 5.1.3
    C: RCPT TO:<u@ourdom.example> FOOBAR    S: 555 5.5.4
    C: RCPT TO:<u@ourdom.example> NOTIFY=NEVER,DELAY    S: 501 5.5.4
    C: RCPT TO:<u@ourdom.example> NOTIFY=SUCCESS,FAILURE ORCPT=rfc822;u@ourdom.example      S: 250 2.1.5""")
script("rcpt before mail is out of order", READY + r"""
    C: RCPT TO:<u@ourdom.example>       S: 503 5.5.1""")
script("the eleventh protocol error ends the session", r"S: 220 C: EHLO a S: 250 " + "C: FOO S: 500 5.5.2 " * 10
       + "C: FOO S: 421 4.7.0 close C: NOOP")
script("refused recipients are no protocol errors", MAIL + "C: RCPT TO:<x@other.example> S: 554 5.7.1\n" * 20
       + "C: RCPT TO:<u@ourdom.example> S: 250")
script("too many recipients are refused and the earlier ones kept", MAIL + r"""
    C: RCPT TO:<a@ourdom.example>       S: 250
    C: RCPT TO:<b@ourdom.example>       S: 250
    C: RCPT TO:<c@ourdom.example>       S: 452 4.5.3
    C: RCPT TO:<d@ourdom.example>       S: 452 4.5.3
    C: DATA                             S: 354
    C: .                                S: 250""", max_recipients=2, bodies=[b""])
script("recipients refused by the server", MAIL + r"""
    C: RCPT TO:<a@ourdom.example>       S: 451 4.3.0
    C: DATA                             S: 503 5.5.1
    C: DATA                             S: 503 5.5.1""", answers={"rcpt": etrn.Reply(451, "4.3.0", "later")})
script("mail refused by the server leaves no transaction", READY + r"""
    C: MAIL FROM:<a@b.example>          S: 452 4.3.1
    C: RCPT TO:<u@ourdom.example>       S: 503 5.5.1
    C: ETRN ourdom.example              S: 250""", answers={"mail": etrn.Reply(452, "4.3.1", "full")})
script("a message refused by the server leaves the session usable", DATA + r"""C: x
    C: .                                S: 451 4.3.0
    C: MAIL FROM:<a@b.example>          S: 250""", answers={"commit": etrn.Reply(451, "4.3.0", "later")})
script("rset helo and ehlo clear the envelope", MAIL + r"""
    C: RSET                             S: 250
    C: RCPT TO:<u@ourdom.example>       S: 503 5.5.1
    C: MAIL FROM:<>                     S: 250
    C: RCPT TO:<u@ourdom.example>       S: 250
    C: HELO x                           S: 250
    C: DATA                             S: 503 5.5.1
    C: MAIL FROM:<>                     S: 250
    C: EHLO x                           S: 250
    C: RCPT TO:<u@ourdom.example>       S: 503 5.5.1""")
script("data out of order or with an argument", READY + r"""
    C: DATA                             S: 503 5.5.1
    C: MAIL FROM:<>                     S: 250
    C: DATA                             S: 503 5.5.1
    C: RCPT TO:<u@ourdom.example>       S: 250
    C: DATA FOOBAR                      S: 501 5.5.4
    C: DATA                             S: 354
    C: .                                S: 250""")
script("empty lines and control characters", r"""S: 220
    C:                                  S: 500 5.5.2
    C: \x80FAIL                         S: 500 5.5.2
    C: HELO a\x00b                      S: 500 5.5.2
    C: HELO\ta                          S: 500 5.5.2
    C: HELO a\rb                        S: 500 5.5.2
    C: HELO \x7f                        S: 500 5.5.2
    C: NOOP \xff                        S: 5
    C: NOOP                             S: 250""")
script("commands may end in a bare lf", r"""S: 220
    R: HELO a\nMAIL FROM:<>\nRCPT TO:<u@ourdom.example>\nDATA\r\n           S: 250 S: 250 S: 250 S: 354
    R: x\r\n.\r\nQUIT\n                 S: 250 S: 221 close""", bodies=[b"x\r\n"])
script("a line of 2048 octets is too long and one less is not", "S: 220\nC: NOOP %s S: 250\nC: NOOP %s S: 500 5.5.2\nC: NOOP S: 250" % (
    "x" * (2048 - 7), "x" * (2049 - 5)))
script("a line of a million octets is one error", "S: 220\nR: %s S: 500 5.5.2\nR: \\r\\nNOOP\\r\\n S: 250" % ("x" * 1000000))
script("data that looks like an end behind a long line is no command", "S: 220\nR: %s\\nNOOP\\n S: 500 5.5.2 S: 250" % ("NOOP " * 1000))
for verb in ("GET", "POST", "CONNECT", "HEAD", "PUT", "OPTIONS"):
    script("the http verb %s ends the session" % verb, "S: 220\nC: %s / HTTP/1.1 S: 521 5.5.1 close\nC: Host: x\nC:\nC: NOOP" % verb)
script("proxy headers are unknown commands", READY + r"""
    C: PROXY TCP4 192.0.2.1 192.0.2.2 1 2       S: 500 5.5.2
    C: XCLIENT ADDR=127.0.0.1           S: 500 5.5.2
    C: XFORWARD NAME=x                  S: 500 5.5.2
    R: \r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c       S: 500 S: 500 S: 500 S: 221 close""")
script("an empty message", DATA + r"""C: .      S: 250 2.0.0""", bodies=[b""])
script("dots are unstuffed once", DATA + r"""C: ..
    C: .From
    C: ..x
    C: ...
    C: x.
    C: .
    S: 250 2.0.0""", bodies=[b".\r\nFrom\r\n.x\r\n..\r\nx.\r\n"])
script("text lines of any length and any octets but stray newlines pass", DATA + r"""R: \xff\x80\x1b\x7f\t%s\r\n.\r\n
    S: 250 2.0.0""" % ("y" * 5000), bodies=[b"\xff\x80\x1b\x7f\t" + b"y" * 5000 + b"\r\n"])
script("stray newlines are mended", DATA + r"""R: test\r\nmail\rdeli\x00miters\nsaved\r\n.\r\n       S: 250""",
       bodies=[b"test\r\nmail delimiters\r\nsaved\r\n"])
script("stray newlines are refused where so configured", DATA + r"""R: test\r\nmail\rdelimiters\nsaved\r\n.\r\n       S: 550 5.6.0
    C: MAIL FROM:<>         S: 250""", bare_newline="reject", bodies=[])
script("a nul alone is refused where so configured", DATA + r"""R: a\x00b\r\n.\r\n       S: 550 5.6.0""", bare_newline="reject", bodies=[])
script("data over the limit is read to its end and refused there", DATA + "C: %s\nC: .\nS: 552 5.3.4\n" % ("z" * 1100) + r"""
    C: MAIL FROM:<>             S: 250
    C: RCPT TO:<u@ourdom.example>       S: 250
    C: DATA                     S: 354
    C: small
    C: .                        S: 250""", size_limit=1000, bodies=[b"small\r\n"])
script("data of just the limit is taken", DATA + "C: %s\nC: .\nS: 250" % ("z" * 998), size_limit=1000, bodies=[b"z" * 998 + b"\r\n"])
script("the first fault of a message wins", DATA + "R: %s\\n.\\n\\r\\n.\\r\\n\nS: 552 5.3.4" % ("z" * 1100), size_limit=1000,
       bare_newline="reject", bodies=[])
script("a message without end is cut off", DATA + "R: %s S: 552 5.3.4 close" % ("z\\r\\n" * 40000), size_limit=1000, bodies=[])
script("a hundred hops are too many", DATA + "C: Received: from a by b; x\n" * 100 + "C:\nC: x\nC: .\nS: 554 5.4.6", bodies=[])
script("ninety nine hops are not", DATA + "C: Received: from a by b; x\n" * 99 + "C:\nC: Received: in the body\nC: .\nS: 250")
script("our own name thrice is a loop", DATA + (r"C: received: from a\r\n\tby Backup.Example.NET. (x) id 1; y" + "\n") * 3
       + "C:\nC: .\nS: 554 5.4.6", bodies=[])
script("our own name as part of another is no loop", DATA + "C: Received: from backup.example.net by xbackup.example.net; y\n" * 5
       + "C:\nC: .\nS: 250")
script("a header without an end is counted too", DATA + "C: Received: from a by b; x\n" * 100 + "C: .\nS: 554 5.4.6", bodies=[])
script("pipelined commands are answered in order", r"""S: 220
    R: EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<u@ourdom.example>\r\nRCPT TO:<u@other.example>\r\nDATA\r\n
    S: 250 S: 250 2.1.0 S: 250 2.1.5 S: 554 5.7.1 S: 354
    R: x\r\n.\r\nMAIL FROM:<>\r\nQUIT\r\n           S: 250 2.0.0 S: 250 2.1.0 S: 221 close""", bodies=[b"x\r\n"])

# -- ETRN, RFC 1985

script("etrn in mid-transaction is refused", READY + r"""
    C: MAIL FROM:<>             S: 250
    C: ETRN ourdom.example      S: 503 5.5.1
    C: RSET                     S: 250
    C: ETRN ourdom.example      S: 250""")
script("etrn syntax", READY + r"""
    C: ETRN                     S: 500 5.5.4
    C: ETRN #queue              S: 501 5.5.4
    C: ETRN @                   S: 501 5.5.4
    C: ETRN *                   S: 501 5.5.4
    C: ETRN a.example b.example S: 501 5.5.4
    C: ETRN ../../etc           S: 501 5.5.4
    C: ETRN %2e%2e              S: 501 5.5.4
    C: ETRN -x.example          S: 501 5.5.4
    C: ETRN [192.0.2.1]         S: 501 5.5.4
    C: etrn @OURDOM.example     S: 250
    C: ETRN ourdom.example      S: 250""")
script("more etrn syntax", READY + "C: ETRN a\\x00b S: 500\nC: ETRN \\xff S: 501\nC: ETRN %s S: 501 5.5.4\nC: ETRN @@a.example S: 501 5.5.4" % ("a" * 1000))
script("etrn after helo only and with bare lf", r"S: 220 R: HELO gw\netrn ourdom.example\n S: 250 S: 250")

# -- BDAT, RFC 3030

script("bdat in chunks", RCPT + r"""
    R: BDAT 5\r\nab\r\nc        S: 250 2.0.0
    R: BDAT 4\r\nd\r\n.         S: 250 2.0.0
    R: BDAT 2 LAST\r\n\r\n      S: 250 2.0.0
    C: QUIT                     S: 221 close""", bodies=[b"ab\r\ncd\r\n.\r\n"])
script("bdat with an empty last chunk", RCPT + r"""
    R: BDAT 3\r\na\r\n          S: 250
    C: BDAT 0 LAST              S: 250
    C: NOOP                     S: 250""", bodies=[b"a\r\n"])
script("bdat of nothing at all", RCPT + "C: bdat 0 last S: 250", bodies=[b""])
script("bdat chunks are not dot stuffed", RCPT + r"R: BDAT 11 LAST\r\n..a\r\n.\r\n.\r\n S: 250", bodies=[b"..a\r\n.\r\n.\r\n"])
script("bdat ends a line that was left open", RCPT + r"R: BDAT 3 LAST\r\nabc S: 250", bodies=[b"abc\r\n"])
script("bdat before rcpt swallows its chunk", MAIL + r"""
    R: BDAT 6 LAST\r\nQUIT\r\n  S: 503 5.5.1
    C: RCPT TO:<u@ourdom.example>       S: 250""", bodies=[])
script("bdat before helo and before mail swallows its chunk", r"""S: 220
    R: BDAT 6\r\nQUIT\r\n       S: 503 5.5.1
    C: EHLO x                   S: 250
    R: BDAT 6 LAST\r\nQUIT\r\n  S: 503 5.5.1
    C: NOOP                     S: 250""", bodies=[])
script("bdat behind refused recipients swallows its chunk and is no error", MAIL + r"""
    C: RCPT TO:<u@other.example>        S: 554 5.7.1
    R: BDAT 6 LAST\r\nQUIT\r\n  S: 503 5.5.1
    C: RSET                     S: 250""", bodies=[])
script("bdat syntax", RCPT + r"""
    C: BDAT                     S: 501 5.5.4
    C: BDAT -1                  S: 501 5.5.4
    C: BDAT 5x                  S: 501 5.5.4
    C: BDAT LAST                S: 501 5.5.4
    C: BDAT 1 FIRST             S: 501 5.5.4
    C: BDAT 1 LAST LAST         S: 501 5.5.4
    C: BDAT 999999999999999999999       S: 501 5.5.4""")
script("a huge chunk ends the session", RCPT + r"C: BDAT 99999999999999999999 LAST    S: 552 5.3.4 close", size_limit=1000, bodies=[])
script("a huge chunk before mail ends the session", READY + r"C: BDAT 99999999999999999999    S: 552 5.3.4 close", size_limit=1000)
script("chunks over the limit are refused and their octets swallowed", RCPT + "R: BDAT 1001\\r\\n%s S: 552 5.3.4" % ("z" * 1001) + r"""
    R: BDAT 6 LAST\r\nQUIT\r\n  S: 552 5.3.4
    C: NOOP                     S: 250""", size_limit=1000, bodies=[])
script("data after bdat is out of order", RCPT + r"""
    R: BDAT 3\r\na\r\n          S: 250
    C: DATA                     S: 503 5.5.1
    C: RCPT TO:<v@ourdom.example>       S: 503 5.5.1
    C: MAIL FROM:<>             S: 503 5.5.1
    C: ETRN ourdom.example      S: 503 5.5.1
    C: BDAT 0 LAST              S: 250""", bodies=[b"a\r\n"])
script("rset between chunks forgets them", RCPT + r"""
    R: BDAT 3\r\na\r\n          S: 250
    C: RSET                     S: 250
    R: BDAT 6 LAST\r\nQUIT\r\n  S: 503 5.5.1
    C: MAIL FROM:<>             S: 250
    C: RCPT TO:<u@ourdom.example>       S: 250
    R: BDAT 3 LAST\r\nb\r\n     S: 250""", bodies=[b"b\r\n"])
script("a carriage return at the end of a chunk meets its line feed in the next", RCPT + r"""
    R: BDAT 2\r\na\r            S: 250
    R: BDAT 2 LAST\r\n\nb       S: 250""", bodies=[b"a\r\nb\r\n"])
script("stray newlines in bdat are refused where so configured", RCPT + r"R: BDAT 4 LAST\r\na\nb\r S: 550 5.6.0", bare_newline="reject",
       bodies=[])


class Sessions(unittest.TestCase):
    def test_the_ehlo_reply_offers_what_the_contract_lists(self) -> None:
        player = play(b"EHLO x\r\n", size_limit=4711)
        lines = [line[4:] for line in player.actions[0][1].decode().split("\r\n")[1:-1]]
        self.assertEqual(lines[0], "backup.example.net")
        self.assertEqual(sorted(line.split()[0] for line in lines[1:]), sorted(
            "PIPELINING SIZE 8BITMIME SMTPUTF8 ENHANCEDSTATUSCODES DSN CHUNKING ETRN LIMITS".split()))
        self.assertIn("SIZE 4711", lines)

    def test_dsn_parameters_and_the_body_type_reach_the_transaction(self) -> None:
        session = new_session()
        asked = []
        player = Player(session)
        with mock.patch.object(player, "shown", asked.append):
            player.receive(b"EHLO x\r\nMAIL FROM:<a@b.example> RET=FULL ENVID=e+2B BODY=8BITMIME SIZE=9\r\n"
                           b"RCPT TO:<u@ourdom.example> NOTIFY=DELAY ORCPT=rfc822;x@y\r\nDATA\r\n.\r\n")
        transaction = asked[-1]
        self.assertEqual((transaction.ret, transaction.envid, transaction.body, transaction.size), ("FULL", "e+2B", "8BITMIME", 9))
        self.assertEqual([(one.notify, one.orcpt) for one in transaction.recipients], [("DELAY", "rfc822;x@y")])

    def test_postmaster_goes_to_the_first_served_domain(self) -> None:
        player = play(b"HELO x\r\nMAIL FROM:<>\r\nRCPT TO:<PostMaster>\r\nDATA\r\n.\r\n")
        self.assertEqual([value[1] for what, value in player.actions if what == "commit"], [("PostMaster@" + DOMAIN,)])

    def test_what_arrives_while_an_answer_is_awaited_is_kept_for_later(self) -> None:
        session = new_session()
        session.receive(b"EHLO x\r\n")
        asked = session.receive(b"MAIL FROM:<>\r\nNOOP\r\n")
        self.assertEqual([type(one).__name__ for one in asked], ["Ask"])
        self.assertEqual(session.receive(b"NOOP\r\n"), [])
        sent = b"".join(one.data for one in session.resume(None))
        self.assertEqual(re.findall(rb"(?m)^\d+", sent), [b"250"] * 3)

    def test_a_large_message_passes_in_bounded_pieces(self) -> None:
        player = Player(new_session())
        player.receive(b"HELO x\r\nMAIL FROM:<>\r\nRCPT TO:<u@ourdom.example>\r\nDATA\r\n")
        sent = 0
        for number in range(100):
            block = (b"%05d" % number + b"x" * 8185 + b"\r\n") * 8
            player.receive(block)
            sent += len(block)
            held = len(player.session.buffer) + len(player.session.transaction.header or b"")
            self.assertLess(held, etrn.HEADER_SCAN_MAX + 100000)
        player.receive(b".\r\n")
        self.assertLess(player.largest, 100000)
        self.assertEqual(len(player.bodies[0]), sent)

    def test_no_reply_comes_before_the_end_of_data_over_the_limit(self) -> None:
        player = play(b"HELO x\r\nMAIL FROM:<>\r\nRCPT TO:<u@ourdom.example>\r\nDATA\r\n" + b"x" * 1500, size_limit=1000)
        self.assertEqual(player.replies[-1][:3], "354")
        self.assertEqual(player.session.buffer, b"")

    def test_rejections_are_noted_in_one_line_that_cannot_be_forged(self) -> None:
        player = play(b"HELO x\xe2\x80\xae\r\nMAIL FROM:<\"a b\"@b.example>\r\nRCPT TO:<u\xc2\x85@other.example>\r\nRCPT TO:<u@other.example>\r\n")
        notes = [value[0] for what, value in player.actions if what == "note"]
        self.assertEqual(len(notes), 1)
        self.assertTrue(notes[0].isprintable(), notes)
        self.assertTrue(notes[0].startswith("NOQUEUE: reject: RCPT from unknown[192.0.2.7]: 554 5.7.1 <u@other.example>: "), notes)

    def test_our_received_field_is_in_form_whatever_the_client_said(self) -> None:
        for helo, protocol in cases(self, [("EHLO mx.b.example", b"ESMTP"), ("HELO (x); by y", b"SMTP"), ("EHLO é\u202e", b"ESMTP")]):
            session = new_session()
            Player(session).receive(helo.encode() + b"\r\nMAIL FROM:<>\r\nRCPT TO:<u@ourdom.example>\r\n")
            field = etrn.format_received(session, session.transaction, "ABC123", 1764000000.0)
            text = field.decode("ascii")
            self.assertRegex(text, r"(?s)\AReceived: from \S+ \(unknown \[192\.0\.2\.7\]\)\r\n\tby backup\.example\.net .*with %s id ABC123"
                             r"\r\n\tfor <u@ourdom\.example>;\r\n\t[^\r\n]+\r\n\Z" % protocol.decode())
            self.assertIsNotNone(email.utils.parsedate_to_datetime(text.rpartition(";")[2].strip()))


# == 5. SMUGGLING ==============================================================
# Only CRLF . CRLF ends data, and nothing else leaves as a line end.

VECTORS = [b"\n.\n", b"\n.\r", b"\r.\n", b"\r.\r", b"\n.\r\n", b"\r.\r\n", b"\r\n.\n", b"\r\n.\r", b"\r\n.\r\r\n", b"\r\r\n.\r\r\n",
           b"\r\n\x00.\r\n", b"\r\n.\x00\r\n", b".\r", b".\n", b"\r\n..\r.\n", b"\n\n.\r\n"]
EVIL = b"MAIL FROM:<evil@x.example>\r\nRCPT TO:<victim@ourdom.example>\r\nDATA\r\nSubject: evil\r\n\r\nevil"
FRONTS = [b"", b"Subject: x\r\n\r\ntext", b"Subject: x\r\n\r\n..\r\n", b"x\r\n..\r\n"]     # the last two: after a dot line
OPENING = b"EHLO x\r\nMAIL FROM:<a@b.example>\r\nRCPT TO:<u@ourdom.example>\r\n"


def mended(raw: bytes) -> bytes:
    """What a body must become, said in another way than the relay says it."""
    return re.sub(rb"\r\n|\r|\n", lambda match: b" " if match.group() == b"\r" else b"\r\n", raw.replace(b"\0", b""))


def unstuffed(raw: bytes) -> bytes:
    return b"\r\n".join(line[1:] if line.startswith(b".") else line for line in raw.split(b"\r\n"))


class Smuggling(unittest.TestCase):
    def check(self, stream: bytes, cuts: Sequence[Iterable[int]], expected: bytes, replies: List[str], **options: Any) -> None:
        for cut in cuts:
            player = play(stream, cut, **options)
            self.assertEqual(player.bodies, [expected])
            self.assertEqual([reply[:3] for reply in player.replies], replies)
            self.assertIsNone(re.search(rb"\r(?!\n)|(?<!\r)\n|\0", player.bodies[0]))
            self.assertEqual(player.count("mail"), 1)

    def test_no_vector_ends_the_data_wherever_it_stands_and_however_it_comes(self) -> None:
        for vector, front in cases(self, itertools.product(VECTORS, FRONTS)):
            raw = front + vector + EVIL + b"\r\n"
            stream = OPENING + b"DATA\r\n" + raw + b".\r\nQUIT\r\n"
            at = len(OPENING) + 6 + len(front)
            cuts: List[Iterable[int]] = [(), range(len(stream))]
            cuts += [(offset,) for offset in range(at - 3, at + len(vector) + 4)]
            cuts += [(offset, offset + 1) for offset in range(at - 2, at + len(vector) + 2)]
            self.check(stream, cuts, mended(unstuffed(raw)), ["220", "250", "250", "250", "354", "250", "221"])

    def test_no_vector_at_any_cut_of_the_whole_stream(self) -> None:
        for vector in cases(self, VECTORS):
            raw = b"x" + vector + EVIL + b"\r\n"
            stream = OPENING + b"DATA\r\n" + raw + b".\r\n"
            self.check(stream, [(offset,) for offset in range(len(stream))], mended(unstuffed(raw)), ["220", "250", "250", "250", "354", "250"])

    def test_no_vector_within_bdat_nor_between_two_chunks(self) -> None:
        for vector, front in cases(self, itertools.product(VECTORS, FRONTS)):
            raw = front + vector + EVIL + b"\r\n.\r\n"
            for size in range(len(front), len(front) + len(vector) + 1):
                stream = OPENING + b"BDAT %d\r\n%sBDAT %d LAST\r\n%sQUIT\r\n" % (size, raw[:size], len(raw) - size, raw[size:])
                self.check(stream, [(), range(len(stream))], mended(raw), ["220", "250", "250", "250", "250", "250", "221"])

    def test_every_vector_is_refused_at_the_true_end_where_so_configured(self) -> None:
        for vector, front, how in cases(self, itertools.product(VECTORS, FRONTS, ("DATA", "BDAT"))):
            raw = front + vector + EVIL + b"\r\n"
            stream = OPENING + (b"DATA\r\n" + raw + b".\r\n" if how == "DATA" else b"BDAT %d LAST\r\n" % len(raw) + raw) + b"NOOP\r\n"
            for cuts in ((), range(len(stream))):
                player = play(stream, cuts, bare_newline="reject")
                self.assertEqual((player.bodies, player.count("mail")), ([], 1))
                self.assertEqual([reply[:9] for reply in player.replies[-2:]], ["550 5.6.0", "250 2.0.0"])

    def test_no_vector_ends_data_that_is_over_the_limit(self) -> None:
        for vector in cases(self, VECTORS):
            stream = OPENING + b"DATA\r\n" + b"x" * 600 + vector + EVIL + b"\r\n.\r\nNOOP\r\n"
            for cuts in ((), range(len(stream))):
                player = play(stream, cuts, size_limit=500)
                self.assertEqual((player.bodies, [reply[:3] for reply in player.replies[-3:]]), ([], ["354", "552", "250"]))

    def test_a_true_end_behind_a_bare_newline_is_an_end(self) -> None:
        player = play_all_ways(self, OPENING + b"DATA\r\nx\n\r\n.\r\nNOOP\r\n")
        self.assertEqual((player.bodies, player.replies[-1][:3]), ([b"x\r\n\r\n"], "250"))

    def test_random_octets_come_out_mended_and_whole(self) -> None:
        chance = random.Random(1)
        for _ in range(300):
            raw = bytes(chance.choice(b"\r\n.\0a") for _ in range(chance.randrange(1, 40)))
            if b"\r\n.\r\n" in b"\r\n" + raw + b"\r\n":
                continue
            stream = OPENING + b"DATA\r\n" + raw + b"\r\n.\r\n"
            cuts = chance.sample(range(len(stream)), 3)
            self.check(stream, [cuts], mended(unstuffed(raw + b"\r\n")), ["220", "250", "250", "250", "354", "250"])


class Addresses(unittest.TestCase):
    """Tricks to have mail relayed to elsewhere; `our` domain is ourdom.example."""

    def answer(self, line: bytes, parameters: bytes = b"") -> List[str]:
        return play_all_ways(self, b"EHLO x\r\nMAIL FROM:<a@b.example>%s\r\n%s\r\n" % (parameters, line)).replies[3:]

    def test_mail_for_elsewhere_is_refused_whatever_its_disguise(self) -> None:
        for path in cases(self, [
                "<u@other.example>", "<u%other.example@ourdom.example>", "<other.example!u@ourdom.example>",
                "<@ourdom.example:u@other.example>", "<@other.example:u@ourdom.example>", '<"u@other.example"@ourdom.example>',
                '<"u@ourdom.example"@other.example>', "<u@[127.0.0.1]>", "<u@[192.0.2.1]>", "<u@[IPv6:::1]>",
                "<u@ourdom.example.evil.example>", "<u@evilourdom.example>", "<u@example>", "<u@our_dom.example>", "<%2e%2e%2f@ourdom.example>",
                "<u@wild.example>", "<u@xwild.example>"]):
            self.assertEqual([reply[:9] for reply in self.answer(b"RCPT TO:" + path.encode())], ["554 5.7.1"])

    def test_what_is_no_path_is_refused(self) -> None:
        for path in cases(self, [
                b"<u@other.example@ourdom.example>", b"<u@ourdom.example@other.example>", b"<u@ourdom.example.>", b"<u@>",
                b"<@ourdom.example>", b"<>", b"<u>", b"u@ourdom.example", b"<u@ourdom.example> <v@other.example>",
                b"<u@ourdom.example>,<v@other.example>", b"<u@ourdom.example>NOTIFY=NEVER", b"<u@ourdom.example\x00.evil.example>",
                b"<u@ourdom.example\t>", b"<a\rRCPT TO:<v@other.example>@ourdom.example>", b"<../../etc/x@ourdom.example>",
                b"<$(id)@ourdom.example>", b"<" + b"x" * 65 + b"@ourdom.example>", b"<u@" + b"x." * 120 + b"ourdom.example>",
                b"<" + b"x" * 1000 + b"@ourdom.example>", "<\u202eu@ourdom.example>".encode(), "<e\u0301@ourdom.example>".encode(),
                b"<u @ourdom.example>", b"<(c)u@ourdom.example>", b'<"u@ourdom.example>']):
            replies = self.answer(b"RCPT TO:" + path)
            self.assertEqual(([reply[0] for reply in replies], len(replies)), (["5"], 1))

    def test_a_line_end_within_an_address_begins_another_bad_command(self) -> None:
        for newline in cases(self, [b"\r\n", b"\n"]):
            replies = self.answer(b"RCPT TO:<a" + newline + b"RCPT TO:<v@other.example>@ourdom.example>")
            self.assertEqual([reply[:3] for reply in replies], ["501", "501"])

    def test_our_own_addresses_are_accepted_in_every_spelling(self) -> None:
        for path, address in cases(self, [
                ("<u@OURDOM.Example>", "u@ourdom.example"), ("<postmaster>", "postmaster@ourdom.example"),
                ("<Postmaster@OURDOM.example>", "Postmaster@ourdom.example"), ("<u@a.b.wild.example>", "u@a.b.wild.example"),
                ("<u@xn--mnchen-3ya.example>", "u@xn--mnchen-3ya.example"), ("<u@XN--mnchen-3ya.example>", "u@xn--mnchen-3ya.example"),
                ("<u@münchen.example>", "u@xn--mnchen-3ya.example"), ("<-oX@ourdom.example>", "-oX@ourdom.example"),
                ("<|cmd@ourdom.example>", "|cmd@ourdom.example"), ('<"a b"@ourdom.example>', '"a b"@ourdom.example')]):
            player = play(b"EHLO x\r\nMAIL FROM:<a@b.example> SMTPUTF8\r\nRCPT TO:%s\r\n" % path.encode())
            self.assertEqual([str(value.path) for what, value in player.actions if what == "rcpt"], [address])
            self.assertEqual(player.replies[-1][:9], "250 2.1.5")


# == 6. SCHEDULE ===============================================================

class Clock:
    """Both clocks.  advance() moves them together, jump() the wall clock alone."""

    def __init__(self) -> None:
        self.mono, self.wall = 1000.0, 1764000000.0

    @property
    def now(self) -> etrn.Now:
        return etrn.Now(self.mono, self.wall)

    def advance(self, seconds: float = 0, hours: float = 0, days: float = 0) -> etrn.Now:
        step = seconds + 3600 * hours + 86400 * days
        self.mono += step
        self.wall += step
        return self.now

    def jump(self, seconds: float) -> etrn.Now:
        self.wall += seconds
        return self.now


class Schedule(unittest.TestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.configure()

    def configure(self, domain: str = "", count: int = 0) -> None:
        self.site = etrn.Site(DOMAIN, config("", domain).domain(DOMAIN), self.clock.now)
        for number in range(count):
            self.add("A%05d" % number)

    def add(self, id: str = "A00000", **options: Any) -> etrn.Entry:
        wall = self.clock.wall
        entry = etrn.Entry(id, 100, wall, wall + self.site.cfg.lifetime)
        self.site.add(entry, self.clock.now, **options)
        return entry

    def probe(self, error: str = "connection refused") -> float:
        """Wait until it is tried, let it fail; returns the seconds waited."""
        began = self.clock.mono
        while not self.site.wanted(self.clock.now):
            at = self.site.wake(self.clock.now)
            self.assertGreater(at, self.clock.mono)
            self.clock.advance(at - self.clock.mono)
        self.site.on_started(self.clock.now)
        if error:
            self.site.on_failed(self.clock.now, error)
        else:
            self.site.on_connected(self.clock.now)
        return self.clock.mono - began

    def prove(self) -> None:
        """It greets and takes its first message."""
        self.probe("")
        canary, = self.site.take(16, self.clock.now)
        self.took_one()
        self.site.drop(canary.id)

    def took_one(self) -> bool:
        """The primary took a message; whether that proved it."""
        return self.site.on_taken(self.clock.now)

    def taken(self, most: int = 1000) -> List[str]:
        return [entry.id for entry in self.site.take(most, self.clock.now)]

    def test_a_primary_without_mail_is_not_tried(self) -> None:
        self.assertFalse(self.site.wanted(self.clock.now))
        self.assertIsNone(self.site.wake(self.clock.now))

    def test_a_down_primary_is_tried_soon_and_then_every_probe_interval(self) -> None:
        for interval in cases(self, [5, 1, 60]):
            self.configure("probe_interval = %ds" % interval, 1)
            pauses = [self.probe() for _ in range(30)]
            self.assertEqual((pauses[0], pauses[-1]), (0, interval))
            self.assertLessEqual(pauses[1], etrn.PROBE_FIRST_S)
            self.assertEqual(pauses, sorted(pauses))
            self.assertIs(self.site.state, etrn.Primary.DOWN)

    def test_a_probe_that_hangs_does_not_keep_the_next_from_finding_the_primary(self) -> None:
        self.add()
        started = 0
        for _ in range(100):
            if self.site.wanted(self.clock.now):
                self.site.on_started(self.clock.now)
                started += 1
            self.clock.advance(0.3)
        self.assertTrue(2 <= started <= etrn.CONNECT_S / self.site.cfg.probe_interval + 1, started)

    def test_a_flood_of_etrns_costs_one_probe_a_second(self) -> None:
        self.add()
        starts = []
        for _ in range(200):
            self.site.flush(self.clock.now)
            if self.site.wanted(self.clock.now):
                starts.append(self.clock.mono)
                self.site.on_started(self.clock.now)
                self.site.on_failed(self.clock.now, "connection refused")
            self.clock.advance(0.05)
        self.assertTrue(9 <= len(starts) <= 11, starts)

    def test_an_etrn_ends_the_pause_at_once(self) -> None:
        self.add()
        for _ in range(20):
            self.probe()
        self.clock.advance(2)
        self.assertFalse(self.site.wanted(self.clock.now))
        self.site.flush(self.clock.now)
        self.assertTrue(self.site.wanted(self.clock.now))

    def test_an_etrn_while_a_connection_opens_is_not_lost(self) -> None:
        self.add()
        for _ in range(20):
            self.probe()
        self.clock.advance(5)
        self.site.on_started(self.clock.now)
        self.clock.advance(2)
        self.site.flush(self.clock.now)
        self.site.on_failed(self.clock.now, "timeout")
        self.assertTrue(self.site.wanted(self.clock.now))

    def test_after_an_outage_one_message_goes_first(self) -> None:
        self.configure(count=50)
        self.probe()
        self.probe("")
        self.assertEqual(self.taken(16), ["A00000"])
        self.assertEqual(self.taken(16), [])
        self.assertFalse(self.site.wanted(self.clock.now))
        self.assertTrue(self.took_one())
        self.assertEqual(len(self.taken(16)), 16)

    def test_messages_go_oldest_first(self) -> None:
        for number in (3, 1, 2):
            self.clock.advance(-10 * number)
            self.add("B%05d" % number)
            self.clock.advance(10 * number)
        self.add("A00000")
        self.prove()
        self.assertEqual(self.taken(), ["B00002", "B00001", "A00000"])

    def test_connections_open_one_after_the_other_up_to_their_number(self) -> None:
        self.configure("connections = 4", 500)
        self.prove()
        opened = [self.site.open]
        for _ in range(20):
            if self.site.wanted(self.clock.now):
                self.site.on_started(self.clock.now)
                self.assertFalse(self.site.wanted(self.clock.now))
                self.site.on_connected(self.clock.now)
            opened.append(self.site.open)
            self.took_one()
        self.assertEqual((opened[0], max(opened)), (1, 4))
        self.assertTrue(all(after - before in (0, 1) for before, after in zip(opened, opened[1:])))

    def test_few_messages_need_one_connection(self) -> None:
        self.configure(count=5)
        self.prove()
        for _ in range(10):
            self.took_one()
        self.assertFalse(self.site.wanted(self.clock.now))

    def full_speed(self) -> None:
        self.configure("connections = 8", 5000)
        self.prove()
        for _ in range(8):
            self.took_one()
        while self.site.wanted(self.clock.now):
            self.site.on_started(self.clock.now)
            self.site.on_connected(self.clock.now)
        self.assertEqual((self.site.open, self.site.limit), (8, 8))

    def test_a_refused_connection_among_others_halves_them_and_is_no_outage(self) -> None:
        self.full_speed()
        self.site.on_started(self.clock.now)
        self.assertFalse(self.site.on_failed(self.clock.now, "421 too many"))
        self.assertEqual((self.site.limit, self.site.state), (4, etrn.Primary.UP))

    def test_a_421_halves_the_connections(self) -> None:
        self.full_speed()
        self.assertFalse(self.site.on_closed(self.clock.now, "421 go slow"))
        self.assertEqual(self.site.limit, 4)
        self.assertFalse(self.site.wanted(self.clock.now))

    def test_mostly_4xx_answers_halve_the_connections(self) -> None:
        self.full_speed()
        for _ in range(etrn.VERDICTS):
            self.site.on_deferred(self.clock.now)
        self.assertEqual(self.site.limit, 4)

    def test_a_few_4xx_answers_change_nothing(self) -> None:
        self.full_speed()
        for _ in range(100):
            self.site.on_deferred(self.clock.now)
            self.took_one()
            self.took_one()
        self.assertEqual(self.site.limit, 8)

    def test_a_canary_that_is_deferred_does_not_let_the_queue_loose(self) -> None:
        self.configure(count=10)
        self.probe("")
        canary, = self.site.take(16, self.clock.now)
        self.site.on_deferred(self.clock.now)
        self.site.defer(canary, self.clock.now, 300)
        self.assertEqual(self.taken(16), [])
        self.clock.advance(60)
        self.assertEqual(len(self.taken(16)), 1)

    def test_a_deferred_message_pauses_longer_each_time(self) -> None:
        self.assertEqual([self.site.pause(n) for n in (1, 2, 3, 4, 5, 6, 2000)], [300, 600, 1200, 2400, 3600, 3600, 3600])

    def test_a_deferred_message_is_due_when_its_pause_is_over(self) -> None:
        self.configure(count=2)
        self.prove()
        entry, = self.site.take(16, self.clock.now)
        self.site.defer(entry, self.clock.now, 300)
        self.assertEqual(self.site.wake(self.clock.now), self.clock.mono + 300)
        self.clock.advance(299)
        self.assertEqual(self.taken(), [])
        self.clock.advance(1)
        self.assertEqual(self.taken(), [entry.id])

    def test_a_flush_makes_everything_due_but_held_mail(self) -> None:
        self.configure(count=4)
        self.prove()
        one, two, three = self.site.take(16, self.clock.now)
        self.site.hold(three, True)
        for entry in (one, two, three):
            self.site.defer(entry, self.clock.now, 3000)
        self.assertEqual(self.taken(), [])
        self.assertTrue(self.site.flush(self.clock.now))
        self.assertEqual(self.taken(), [one.id, two.id])
        self.assertIs(three.state, etrn.State.HOLD)

    def test_a_flush_is_under_way_until_each_of_its_messages_was_tried(self) -> None:
        self.configure(count=3)
        self.prove()
        self.assertTrue(self.site.flush(self.clock.now))
        self.assertFalse(self.site.flush(self.clock.now))
        one, two = self.site.take(16, self.clock.now)
        self.site.defer(one, self.clock.now, 300)
        self.site.drop(two.id)
        self.assertTrue(self.site.flush(self.clock.now))

    def test_a_flush_that_finds_the_primary_down_is_over(self) -> None:
        self.add()
        self.assertTrue(self.site.flush(self.clock.now))
        self.probe()
        self.assertTrue(self.site.flush(self.clock.now))

    def test_a_flush_while_a_message_is_being_sent_sends_it_again_at_once(self) -> None:
        self.configure(count=2)
        self.prove()
        entry, = self.site.take(16, self.clock.now)
        self.site.flush(self.clock.now)
        self.site.defer(entry, self.clock.now, 3000)
        self.assertEqual(self.taken(), [entry.id])
        self.site.defer(entry, self.clock.now, 3000)
        self.assertEqual(self.taken(), [])

    def test_an_outage_that_ends_makes_deferred_mail_due(self) -> None:
        self.configure(count=3)
        self.prove()
        for entry in self.site.take(16, self.clock.now):
            self.site.defer(entry, self.clock.now, 3000)
        self.site.on_closed(self.clock.now, "lost connection")
        self.add("B00000")
        self.probe()
        self.clock.advance(10)
        self.probe("")
        self.took_one()
        self.assertEqual(len(self.taken()), 3)

    def test_an_outage_is_told_once_with_its_length(self) -> None:
        self.add()
        self.site.on_started(self.clock.now)
        self.assertTrue(self.site.on_failed(self.clock.now, "refused"))
        self.clock.advance(hours=2)
        self.site.on_started(self.clock.now)
        self.assertFalse(self.site.on_failed(self.clock.now, "refused"))
        self.clock.advance(seconds=60)
        self.site.on_started(self.clock.now)
        self.assertEqual(self.site.on_connected(self.clock.now), 7260)

    def test_held_mail_stays_and_later_mail_with_it(self) -> None:
        self.configure(count=2)
        self.site.hold_all(True)
        self.add("B00000")
        self.assertEqual((self.site.count[etrn.State.HOLD], self.taken()), (3, []))
        self.assertFalse(self.site.wanted(self.clock.now))
        self.site.hold_all(False)
        self.prove()
        self.assertEqual(len(self.taken()), 2)

    def test_a_message_held_while_it_is_sent_is_held_when_it_comes_back(self) -> None:
        self.configure(count=2)
        self.prove()
        entry, = self.site.take(16, self.clock.now)
        self.site.hold(entry, True)
        self.assertIs(entry.state, etrn.State.DELIVERING)
        self.site.give_back(entry)
        self.assertIs(entry.state, etrn.State.HOLD)

    def test_mail_expires_after_its_lifetime_and_three_attempts(self) -> None:
        self.add()
        for _ in range(2):
            self.probe()
        self.clock.advance(days=8)
        self.assertEqual(self.site.expired(self.clock.now), [])
        self.probe()
        self.assertEqual([entry.id for entry in self.site.expired(self.clock.now)], ["A00000"])

    def test_mail_does_not_expire_before_its_time_nor_while_held(self) -> None:
        entry = self.add()
        for _ in range(10):
            self.probe()
        self.clock.advance(days=6.9)
        self.assertEqual(self.site.expired(self.clock.now), [])
        self.site.hold(entry, True)
        self.clock.advance(days=2)
        self.assertEqual(self.site.expired(self.clock.now), [])
        self.site.hold(entry, False)
        self.assertEqual(self.site.expired(self.clock.now), [entry])

    def test_a_jump_of_the_clock_alone_expires_nothing(self) -> None:
        self.add()
        for _ in range(10):
            self.probe()
        self.clock.jump(30 * 86400)
        self.site.on_clock_jump()
        self.assertEqual(self.site.expired(self.clock.now), [])
        self.assertEqual(self.site.attempts(self.site.entries["A00000"]), 10)
        for _ in range(3):
            self.probe()
        self.assertEqual(len(self.site.expired(self.clock.now)), 1)

    def test_a_5xx_is_final_after_the_grace_only(self) -> None:
        self.configure("recovery_grace = 1h", 2)
        self.probe()
        self.prove()
        for minutes, since, expected in cases(self, [(0, None, False), (59, None, False), (0, 59, False), (0, 60, True), (60, None, True)]):
            now = etrn.Now(self.clock.mono, self.clock.wall + 60 * minutes)
            self.assertEqual(self.site.is_final(now, since if since is None else now.wall - 60 * since), expected)

    def test_names_of_sites_match_whole_or_on_dot_boundaries(self) -> None:
        cfg = etrn.parse_config("[relay]\ndomains = example.com, a.example.com, badexample.com, .wild.example, x.y.example\n", "/x/c")
        scheduler = etrn.Scheduler(cfg)
        for name in ("example.com", "a.example.com", "badexample.com", "b.wild.example", "x.y.example"):
            scheduler.site(name, self.clock.now)
        for what, expected in cases(self, [
                ("example.com", ["example.com"]), ("@example.com", ["a.example.com", "example.com"]), ("com", []),
                ("@com", ["a.example.com", "badexample.com", "example.com"]), ("@wild.example", ["b.wild.example"]),
                ("xample.com", []), ("@xample.com", []), ("@y.example", ["x.y.example"])]):
            self.assertEqual(sorted(site.name for site in scheduler.matching(what)), expected)
        for what, expected in cases(self, [
                ("example.com", True), ("b.example.com", False), ("@com", True), ("@y.example", True), ("y.example", False),
                ("c.wild.example", True), ("wild.example", False), ("@wild.example", True), ("@net", False), ("other.example", False)]):
            self.assertEqual(scheduler.serves(what), expected)

    def test_new_lifetimes_hold_for_queued_mail(self) -> None:
        scheduler = etrn.Scheduler(config())
        self.site = scheduler.site(DOMAIN, self.clock.now)
        self.add()
        for _ in range(3):
            self.probe()
        self.clock.advance(days=2)
        self.assertEqual(self.site.expired(self.clock.now), [])
        scheduler.reconfigure(config("", "lifetime = 1d"), self.clock.now)
        self.assertEqual(len(self.site.expired(self.clock.now)), 1)


# == 7. DNS ====================================================================

class Packets(unittest.TestCase):
    """Built by hand; nothing but DnsError may come of them."""

    HEAD = struct.pack("!HHHHHH", 7, 0x8180, 1, 1, 0, 0)
    ASKED = wire_name("a.example") + struct.pack("!HH", etrn.MX, 1)

    def parse(self, packet: bytes, kind: int = etrn.MX, name: str = "a.example") -> Optional[etrn.Answer]:
        return etrn.parse_answer(packet, 7, name, kind)

    def test_answers_are_read(self) -> None:
        for kind, data in cases(self, [(etrn.A, ["192.0.2.1", "192.0.2.2"]), (etrn.AAAA, ["2001:db8::1"]),
                                       (etrn.MX, [(10, "m1.example"), (20, "m2.example"), (0, "")]), (etrn.PTR, ["host.example"])]):
            packet = dns_answer(7, "a.example", kind, [record("a.example", kind, one) for one in data])
            self.assertEqual(self.parse(packet, kind), etrn.Answer(0, False, data))

    def test_names_are_compared_without_case_and_compressed_ones_read(self) -> None:
        packet = (struct.pack("!HHHHHH", 7, 0x8180, 1, 1, 0, 0) + wire_name("A.eXample") + struct.pack("!HH", etrn.MX, 1)
                  + b"\xc0\x0c" + struct.pack("!HHIH", etrn.MX, 1, 9, 6) + b"\0\x05\x01m\xc0\x0e")
        self.assertEqual(self.parse(packet), etrn.Answer(0, False, [(5, "m.example")]))

    def test_aliases_are_followed_within_the_packet_and_not_round_in_circles(self) -> None:
        chain = [record("a.example", etrn.CNAME, "b.example"), record("b.example", etrn.CNAME, "c.example"),
                 record("c.example", etrn.A, "192.0.2.1")]
        circle = [record("a.example", etrn.CNAME, "b.example"), record("b.example", etrn.CNAME, "a.example")]
        self.assertEqual(self.parse(dns_answer(7, "a.example", etrn.A, chain), etrn.A).records, ["192.0.2.1"])
        self.assertEqual(self.parse(dns_answer(7, "a.example", etrn.A, circle), etrn.A).records, [])

    def test_records_of_other_owners_kinds_and_classes_are_left_out(self) -> None:
        chaos = wire_name("a.example") + struct.pack("!HHIH", etrn.A, 3, 1, 4) + b"\1\2\3\4"
        for other in cases(self, [record("b.example", etrn.A, "192.0.2.9"), record("a.example", etrn.AAAA, "::1"), chaos]):
            self.assertEqual(self.parse(dns_answer(7, "a.example", etrn.A, [other]), etrn.A).records, [])

    def test_packets_that_answer_another_question_are_ignored(self) -> None:
        good = dns_answer(7, "a.example", etrn.MX)
        for packet in cases(self, [
                b"", good[:11], dns_answer(8, "a.example", etrn.MX), dns_answer(7, "b.example", etrn.MX), dns_answer(7, "a.example", etrn.A),
                dns_answer(7, "a.example", etrn.MX, flags=0x0100), good[:4] + b"\0\0" + good[6:], good[:4] + b"\0\2" + good[6:],
                good[:-1] + b"\3"]):
            self.assertIsNone(self.parse(packet))
        self.assertIsNotNone(self.parse(good))

    def test_malicious_packets_are_refused(self) -> None:
        at = len(self.HEAD + self.ASKED)
        tail = struct.pack("!HHIH", etrn.MX, 1, 9, 4) + b"\0\1\1m"
        pointer = lambda target: struct.pack("!H", 0xc000 | target)        # noqa: E731
        for what, name in cases(self, [
                ("to itself", pointer(at)), ("forward", pointer(at + 2) + b"\0"), ("beyond the packet", pointer(0x3fff)),
                ("a circle of two", b"\1a" + pointer(at + 4) + pointer(at)), ("half of one", b"\xc0"), ("a label of kind 01", b"\x41a\0"),
                ("a label of kind 10", b"\x81a\0"), ("a label beyond the packet", b"\x3fab"), ("no end", b"\1a"),
                ("300 octets", (b"\x3f" + b"x" * 63) * 5 + b"\0")]):
            self.assertRaises(etrn.DnsError, self.parse, self.HEAD + self.ASKED + name + (tail if what != "half of one" else b""))
        for data in cases(self, [b"", b"\0\1", b"\0\1\5ab", b"\0\1" + pointer(0x3fff)]):
            self.assertRaises(etrn.DnsError, self.parse, dns_answer(7, "a.example", etrn.MX, [record("a.example", etrn.MX, (1, ""))])[:at]
                              + record("a.example", 16, data).replace(b"\0\x10\0\1", b"\0\x0f\0\1"))
        for kind, data in cases(self, [(etrn.A, b"123"), (etrn.A, b"12345"), (etrn.AAAA, b"1234")]):
            packet = dns_answer(7, "a.example", kind, [wire_name("a.example") + struct.pack("!HHIH", kind, 1, 9, len(data)) + data])
            self.assertRaises(etrn.DnsError, self.parse, packet, kind)

    def test_a_name_that_runs_over_its_record_is_refused(self) -> None:
        short = wire_name("a.example") + struct.pack("!HHIH", etrn.MX, 1, 9, 3) + b"\0\1\1"
        packet = dns_answer(7, "a.example", etrn.MX, [short, record("a.example", etrn.MX, (9, "m.example"))])
        self.assertRaises(etrn.DnsError, self.parse, packet)

    def test_counts_that_lie_are_refused(self) -> None:
        packet = dns_answer(7, "a.example", etrn.MX)
        self.assertRaises(etrn.DnsError, self.parse, packet[:6] + b"\xff\xff" + packet[8:])

    def test_every_prefix_of_an_answer_is_harmless(self) -> None:
        for kind, data in cases(self, [(etrn.A, "192.0.2.1"), (etrn.AAAA, "::1"), (etrn.MX, (1, "m.example")), (etrn.PTR, "p.example")]):
            packet = dns_answer(7, "a.example", kind, [record("a.example", etrn.CNAME, "b.example"), record("b.example", kind, data)])
            for size in range(len(packet)):
                try:
                    self.assertIsNone(self.parse(packet[:size], kind))
                except etrn.DnsError:
                    pass
            self.assertEqual(self.parse(packet, kind).records, [data])

    def test_random_damage_does_no_harm(self) -> None:
        chance = random.Random(2)
        good = dns_answer(7, "a.example", etrn.MX, [record("a.example", etrn.CNAME, "b.example"), record("b.example", etrn.MX, (1, "m.example"))])
        outcomes = collections.Counter()
        for _ in range(4000):
            packet = bytearray(good)
            for _ in range(chance.randrange(1, 6)):
                packet[chance.randrange(4, len(packet))] = chance.choice((0, 1, 12, 0x3f, 0xc0, 0xff, chance.randrange(256)))
            try:
                outcomes[type(self.parse(bytes(packet)))] += 1
            except etrn.DnsError:
                outcomes["refused"] += 1
        self.assertEqual((sum(outcomes.values()), len(outcomes)), (4000, 3))

    def test_a_query_is_a_query(self) -> None:
        packet = etrn.format_query(7, "a.example", etrn.MX)
        self.assertEqual(packet[:12], struct.pack("!HHHHHH", 7, 0x0100, 1, 0, 0, 1))
        self.assertEqual(packet[12:12 + len(self.ASKED)], self.ASKED)
        self.assertEqual(etrn.format_query(7, "a.example", etrn.MX, False)[12:], self.ASKED)


class Nameservers(unittest.TestCase):
    ZONE = {("a.example", etrn.MX): [(10, "m1.example"), (20, "m2.example")], ("m1.example", etrn.A): ["192.0.2.1"],
            ("m1.example", etrn.AAAA): ["2001:db8::1"], ("m2.example", etrn.A): ["192.0.2.2"], ("bare.example", etrn.A): ["192.0.2.3"],
            ("null.example", etrn.MX): [(0, "")], ("ours.example", etrn.MX): [(5, "m1.example"), (10, "backup.example.net"), (10, "m2.example")],
            ("only.example", etrn.MX): [(1, "backup.example.net"), (2, "m2.example")], ("gone.example", etrn.MX): [(1, "none.example")],
            ("half.example", etrn.MX): [(1, "none.example"), (2, "m2.example")], ("backup.example.net", etrn.A): ["192.0.2.99"],
            ("public.example", etrn.MX): [(1, "m3.example"), (2, "m2.example")], ("m3.example", etrn.A): ["127.0.0.1", "10.0.0.1", "9.9.9.9"]}

    def setUp(self) -> None:
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)

    def dns(self, **options: Any) -> Dns:
        return self.stack.enter_context(Dns(options.pop("zone", self.ZONE), **options))

    def resolver(self, *servers: Dns) -> etrn.Resolver:
        return etrn.Resolver(tuple(one.endpoint for one in servers or [self.dns()]))

    def route(self, domain: str, *servers: Dns, **plan: Any) -> List[str]:
        cfg = config("", "primary = mx").domain(DOMAIN)
        hops, self.warning = etrn.find_route(make_plan(cfg, "mx", resolver=self.resolver(*servers), **{"site": domain, **plan}))
        return [str(hop) for hop in hops]

    def test_records_come_over_udp(self) -> None:
        self.assertEqual(self.resolver().query("a.example", etrn.MX), self.ZONE["a.example", etrn.MX])

    def test_a_truncated_answer_is_fetched_over_tcp(self) -> None:
        server = self.dns(truncate=True)
        self.assertEqual(self.resolver(server).query("a.example", etrn.MX), self.ZONE["a.example", etrn.MX])
        self.assertEqual([how for how, _, _ in server.asked], ["udp", "tcp"])

    def test_a_name_that_does_not_exist_is_an_error_and_one_without_records_is_not(self) -> None:
        self.assertRaisesRegex(etrn.DnsError, "no such name", self.resolver().query, "none.example", etrn.MX)
        self.assertEqual(self.resolver().query("bare.example", etrn.MX), [])

    def test_the_next_server_is_asked_when_one_fails(self) -> None:
        for broken in cases(self, [{"rcode": 2}, {"rcode": 5}, {"mangle": lambda packet: None}, {"mangle": lambda packet: packet[:20]},
                                   {"mangle": lambda packet: b"\0\0" + packet[2:] if packet[:2] != b"\0\0" else None},
                                   {"mangle": lambda packet: packet[:6] + b"\xff\xff" + packet[8:]}]):
            with shorten(DNS_TRY_S=0.1):
                first, second = self.dns(**broken), self.dns()
                self.assertEqual(self.resolver(first, second).query("a.example", etrn.MX), self.ZONE["a.example", etrn.MX])
                self.assertTrue(first.asked)

    def test_nobody_answering_is_an_error_in_bounded_time(self) -> None:
        silent = self.dns(mangle=lambda packet: None)
        with shorten(DNS_TRY_S=0.05, DNS_TOTAL_S=0.3):
            self.assertRaisesRegex(etrn.DnsError, "lookup of a.example failed", self.resolver(silent).query, "a.example", etrn.MX)

    def test_an_old_forwarder_is_asked_again_without_edns(self) -> None:
        server = self.dns(mangle=lambda packet: packet[:3] + b"\x81" + packet[4:] if len(server.asked) == 1 else packet)
        self.assertEqual(self.resolver(server).query("a.example", etrn.MX), self.ZONE["a.example", etrn.MX])
        self.assertEqual(len(server.asked), 2)

    def test_addresses_come_ipv4_first(self) -> None:
        self.assertEqual(self.resolver().addresses("m1.example"), ["192.0.2.1", "2001:db8::1"])
        self.assertEqual(self.resolver().addresses("2001:DB8::2"), ["2001:db8::2"])

    def test_routes_follow_mx_preferences_and_fall_back_to_the_address(self) -> None:
        for domain, expected in cases(self, [
                ("a.example", ["m1.example[192.0.2.1]:25", "m1.example[2001:db8::1]:25", "m2.example[192.0.2.2]:25"]),
                ("bare.example", ["bare.example[192.0.2.3]:25"]), ("half.example", ["m2.example[192.0.2.2]:25"])]):
            self.assertEqual(self.route(domain), expected)

    def test_this_host_and_worse_preferences_are_cut(self) -> None:
        self.assertEqual(self.route("ours.example"), ["m1.example[192.0.2.1]:25", "m1.example[2001:db8::1]:25"])

    def test_a_listener_of_ours_among_the_addresses_is_cut_too(self) -> None:
        self.assertEqual(self.route("a.example", listeners=(etrn.Endpoint("192.0.2.2", 25),)),
                         ["m1.example[192.0.2.1]:25", "m1.example[2001:db8::1]:25"])

    def test_whatever_the_dns_says_the_mail_is_kept(self) -> None:
        for domain, expected in cases(self, [("only.example", "loops back"), ("null.example", "null MX"), ("none.example", "no such name"),
                                             ("gone.example", "none.example")]):
            with self.assertRaisesRegex(etrn.PeerError, expected):
                self.route(domain)

    def test_the_last_route_is_used_when_the_dns_fails(self) -> None:
        self.assertEqual(self.route("none.example", last_route=(etrn.Endpoint("192.0.2.7", 25),)), ["192.0.2.7[192.0.2.7]:25"])
        self.assertIn("no such name", self.warning)

    def test_notices_go_to_public_addresses_only(self) -> None:
        cfg = etrn.Scheduler(config()).config_of("notice:public.example")
        plan = make_plan(cfg, "mx", resolver=self.resolver(), site="notice:public.example")
        self.assertEqual([hop.address for hop in etrn.find_route(plan)[0]], ["9.9.9.9"])

    def test_a_resolv_conf_names_its_servers(self) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
            file.write("# x\nsearch example\nnameserver 192.0.2.53\nnameserver ::1\nnameserver\n")
            file.flush()
            self.assertEqual(etrn.read_resolv_conf(file.name), (("192.0.2.53", 53), ("::1", 53)))
        self.assertEqual(etrn.read_resolv_conf("/nowhere/resolv.conf"), (("127.0.0.1", 53),))


def make_plan(cfg: etrn.DomainConfig, primary: Any, **values: Any) -> etrn.Plan:
    """What a delivery connection is given; the one place that knows the shape of Plan."""
    known = dict(site=DOMAIN, cfg=cfg, primary=primary, hostname="backup.example.net", resolver=etrn.Resolver(()), listeners=(),
                 last_route=())
    return etrn.Plan(**dict(known, **values))


# == 8. DSN ====================================================================

HOSTILE = ["550 5.1.1 x\r\nBcc: v@other.example\r\n\r\nhello", "550 \r\n--BOUND/backup.example.net--\r\n", "550 \x00\x1b[2J \u202e",
           "550 caf\xe9 \ud83d \U0001f600", "x" * 100000, "550 =?utf-8?q?a?=\n\tb", ""]


def notice(reports: Sequence[etrn.Report], original: bytes = MESSAGE, full: bool = False, **sidecar: Any) -> Tuple[Any, bytes]:
    """A notice, parsed by a stranger, and its bytes."""
    fields = etrn.make_sidecar("ABCDEF", "mail", "a@sender.example", [(one.address, DOMAIN, "", "", 1764600000.0) for one in reports],
                               1764000000.0, {"address": "192.0.2.7", "helo": "x", "tls": None})
    data = etrn.format_notice("backup.example.net", dict(fields, **sidecar), reports, original, full, 1764500000.0, "BOUND", "mid")
    return email.message_from_bytes(data, policy=email.policy.default), data


def report(**values: Any) -> etrn.Report:
    known = dict(address="u@" + DOMAIN, action="failed", status="5.1.1", response="550 5.1.1 no such user", remote="mail.ourdom.example",
                 orcpt="", attempts=3, last_attempt=1764400000.0)
    return etrn.Report(**dict(known, **values))


class Notices(unittest.TestCase):
    def test_a_notice_is_a_multipart_report(self) -> None:
        message, _ = notice([report(orcpt="rfc822;u+2Bx@old.example"), report(address="v@" + DOMAIN, response="timeout", remote="",
                                                                             status="4.4.7")], envid="QQ+2B1")
        self.assertEqual((message.get_content_type(), message.get_param("report-type")), ("multipart/report", "delivery-status"))
        self.assertEqual((message["To"], message["Auto-Submitted"]), ("<a@sender.example>", "auto-replied"))
        self.assertEqual(len(message.defects), 0)
        text, status, headers = message.iter_parts()
        self.assertEqual([part.get_content_type() for part in message.iter_parts()],
                         ["text/plain", "message/delivery-status", "text/rfc822-headers"])
        self.assertIn("u@" + DOMAIN, text.get_content())
        whole, first, second = status.get_payload()
        self.assertEqual((whole["Reporting-MTA"], whole["Original-Envelope-Id"]), ("dns; backup.example.net", "QQ+1".replace("+1", "+1")))
        self.assertIsNotNone(email.utils.parsedate_to_datetime(whole["Arrival-Date"]))
        for name, value in cases(self, [
                ("Final-Recipient", "rfc822; u@" + DOMAIN), ("Original-Recipient", "rfc822; u+x@old.example"), ("Action", "failed"),
                ("Status", "5.1.1"), ("Remote-MTA", "dns; mail.ourdom.example"), ("Diagnostic-Code", "smtp; 550 5.1.1 no such user")]):
            self.assertEqual(first[name], value)
        self.assertIsNotNone(email.utils.parsedate_to_datetime(first["Last-Attempt-Date"]))
        self.assertEqual((second["Status"], second["Remote-MTA"], second["Diagnostic-Code"]), ("4.4.7", None, "X-etrn-relay; timeout"))
        self.assertEqual(headers.get_content().replace("\n", "\r\n").encode(), MESSAGE)

    def test_the_whole_message_is_returned_where_asked(self) -> None:
        message, _ = notice([report()], full=True)
        part = list(message.iter_parts())[2]
        self.assertEqual(part.get_content_type(), "message/rfc822")
        self.assertEqual(part.get_payload(0)["Subject"], "one")

    def test_expiry_says_how_long_was_tried_and_why(self) -> None:
        message, _ = notice([report(status="4.4.7", response="connect to 192.0.2.1: Connection refused", remote="", attempts=41)])
        text = next(message.iter_parts()).get_content()
        for words in cases(self, ["5d18h", "41 attempts", "Connection refused"]):
            self.assertIn(words, text)

    def test_a_delay_says_until_when_it_is_tried(self) -> None:
        message, _ = notice([report(action="delayed", status="4.4.1")])
        fields = list(message.iter_parts())[1].get_payload()[1]
        self.assertEqual(fields["Action"], "delayed")
        self.assertIsNotNone(email.utils.parsedate_to_datetime(fields["Will-Retry-Until"]))

    def test_foreign_text_puts_neither_header_nor_part_into_the_notice(self) -> None:
        for text in cases(self, HOSTILE):
            message, data = notice([report(response=text, remote=text, orcpt="rfc822;" + (text or "x"))], envid="a+0D+0ABcc:+20v")
            self.assertEqual(len(list(message.iter_parts())), 3)
            self.assertIsNone(message["Bcc"])
            self.assertEqual(len(list(message.iter_parts())[1].get_payload()), 2)
            self.assertTrue(data.isascii() if hasattr(data, "isascii") else True)
            self.assertLess(len(data), 10000)
            self.assertIsNone(re.search(rb"\r(?!\n)|(?<!\r)\n|\0|\x1b", data))
            self.assertIsNone(re.search(rb"(?mi)^bcc:", data))

    def test_lines_of_a_notice_are_not_too_long_for_smtp(self) -> None:
        _, data = notice([report(response="550 " + "word " * 200, remote="h" * 300)])
        self.assertLess(max(map(len, data.split(b"\r\n"))), 998)

    def test_eight_bit_originals_are_declared(self) -> None:
        message, _ = notice([report()], b"Subject: caf\xc3\xa9\r\n")
        self.assertEqual(list(message.iter_parts())[2]["Content-Transfer-Encoding"], "8bit")

    def test_an_internationalized_address_is_named_as_rfc_6533_says(self) -> None:
        message, data = notice([report(address="é@" + DOMAIN)])
        self.assertIn(b"Final-Recipient: utf-8; \\x{E9}@" + DOMAIN.encode(), data)


# == 13. LAYERS ================================================================
# The file's own rules, read from its source.

def sections(source: str) -> List[Tuple[int, int, str]]:
    """(first line, number, name) of each banner."""
    return [(line, int(match.group(1)), match.group(2)) for line, match in (
        (number, re.match(r"# == (\d+)\. ([A-Z]+) =+$", text)) for number, text in enumerate(source.split("\n"), 1)) if match]


class Layers(unittest.TestCase):
    PURE = {"GRAMMAR", "CONFIG", "SESSION", "SCHEDULE", "DSN", "STATUS"}

    @classmethod
    def setUpClass(cls) -> None:
        with open(SOURCE, encoding="utf-8") as file:
            cls.source = file.read()
        cls.tree = ast.parse(cls.source)
        cls.banners = sections(cls.source)

    def section(self, line: int) -> Tuple[int, str]:
        number, name = 0, "IMPORTS"
        for first, its, its_name in self.banners:
            if first <= line:
                number, name = its, its_name
        return number, name

    def definitions(self) -> Dict[str, int]:
        """Each module-level name and the section it comes from."""
        out: Dict[str, int] = {}
        for node in self.tree.body:
            names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else [
                one.id for target in getattr(node, "targets", [getattr(node, "target", None)]) if target is not None
                for one in ast.walk(target) if isinstance(one, ast.Name)]
            for name in names:
                out.setdefault(name, self.section(node.lineno)[0])
        return out

    def test_sections_are_numbered_in_order_and_listed_in_the_manual(self) -> None:
        self.assertEqual([number for _, number, _ in self.banners], list(range(1, len(self.banners) + 1)))
        contents = (etrn.__doc__ or "").partition("\nCONTENTS\n")[2]
        self.assertEqual(re.findall(r"(\d+) ([A-Z]+)", contents), [(str(number), name) for _, number, name in self.banners])

    def test_names_point_backward(self) -> None:
        defined = self.definitions()
        forward = ["%d: %s of section %d" % (node.lineno, node.id, defined[node.id]) for node in ast.walk(self.tree)
                   if isinstance(node, ast.Name) and defined.get(node.id, 0) > self.section(node.lineno)[0]]
        self.assertGreater(len(defined), 200)
        self.assertEqual(forward, [])

    def test_pure_sections_touch_no_socket_file_clock_or_chance(self) -> None:
        forbidden = {"socket", "select", "selectors", "random", "secrets", "threading", "queue", "smtplib", "subprocess", "tempfile"}
        clocks = {"strftime", "gmtime", "localtime"}
        paths = {"join", "dirname", "basename", "abspath"}
        seen, bad = set(), []
        for node in ast.walk(self.tree):
            section = self.section(getattr(node, "lineno", 0))[1]
            if section not in self.PURE:
                continue
            seen.add(section)
            if isinstance(node, ast.Name) and node.id in forbidden:
                bad.append((node.lineno, node.id))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("open", "print", "input", "exec", "eval"):
                bad.append((node.lineno, node.func.id))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if (node.value.id == "os" and node.attr != "path") or (node.value.id == "time" and node.attr not in clocks):
                    bad.append((node.lineno, node.value.id + "." + node.attr))
            if isinstance(node, ast.Attribute) and ast.dump(node.value) == ast.dump(ast.parse("os.path", mode="eval").body):
                if node.attr not in paths:
                    bad.append((node.lineno, "os.path." + node.attr))
        self.assertEqual((seen, bad), (self.PURE, []))

    def test_imports_stand_at_the_top_come_from_the_standard_library_and_are_used(self) -> None:
        nodes = [node for node in ast.walk(self.tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
        self.assertTrue(all(self.section(node.lineno)[0] <= 1 for node in nodes))
        modules = [alias.name if isinstance(node, ast.Import) else str(node.module) for node in nodes for alias in node.names]
        library = os.path.dirname(os.path.realpath(os.__file__))
        for name in cases(self, modules):
            spec = importlib.util.find_spec(name.partition(".")[0])
            origin = os.path.realpath(spec.origin) if spec and spec.origin else "frozen"
            self.assertTrue(origin in ("frozen", "built-in") or not os.path.exists(origin)
                            or (origin.startswith(library) and "site-packages" not in origin), origin)
        used = {node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name)}
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module == "__future__":
                continue
            for alias in node.names:
                self.assertIn((alias.asname or alias.name).partition(".")[0], used)

    def test_the_oldest_python_promised_can_read_the_source(self) -> None:
        for path in cases(self, [SOURCE, os.path.abspath(__file__)]):
            with open(path, encoding="utf-8") as file:
                self.assertIsNotNone(ast.parse(file.read(), feature_version=(3, 8)))

    def test_importing_has_no_effect(self) -> None:
        code = ("import signal, sys, threading, os; before = [signal.getsignal(n) for n in (1, 10, 15)], os.getcwd(), os.environ.copy();"
                "sys.path.insert(0, %r); import etrn_relay; after = [signal.getsignal(n) for n in (1, 10, 15)], os.getcwd(), os.environ.copy();"
                "print(before == after, threading.active_count(), len(os.listdir('.')))" % HERE)
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([sys.executable, "-B", "-c", code], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
        self.assertEqual((done.stdout.decode().split(), done.stderr), (["True", "1", "0"], b""))


# -- running

class Result(unittest.TextTestResult):
    """A failure within a table tells the row."""

    def addFailure(self, test: Any, err: Any) -> None:
        super().addFailure(test, err)
        self.failures[-1] = (test, self.failures[-1][1] + self.row_of(test))

    def addError(self, test: Any, err: Any) -> None:
        super().addError(test, err)
        self.errors[-1] = (test, self.errors[-1][1] + self.row_of(test))

    @staticmethod
    def row_of(test: Any) -> str:
        return "\nat the row %r\n" % (test.row,) if hasattr(test, "row") else ""


def main() -> int:
    parser = argparse.ArgumentParser(description="Tests of etrn_relay.py.")
    parser.add_argument("-k", metavar="PATTERN", default="", help="only tests whose name contains PATTERN")
    parser.add_argument("-v", action="store_true", help="name each test")
    given = parser.parse_args()
    loader = unittest.TestLoader()
    everything = loader.loadTestsFromModule(sys.modules[__name__])
    wanted = given.k.replace(" ", "_").lower()
    chosen = unittest.TestSuite(test for group in everything for test in group if wanted in test.id().lower())
    result = unittest.TextTestRunner(stream=sys.stdout, verbosity=2 if given.v else 1, resultclass=Result).run(chosen)
    failed = {test.id() for test, _ in result.failures + result.errors}
    failed |= {test.id() for test in result.unexpectedSuccesses}
    skipped = {test.id() for test, _ in result.skipped} - failed
    print("%d passed, %d failed, %d skipped" % (max(0, result.testsRun - len(failed) - len(skipped)), len(failed), len(skipped)))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
