#!/usr/bin/env python3
"""Tests of etrn_relay.py.

    python3 test_etrn_relay.py [-k PATTERN] [-v] [-j N] [--long]
    python3 test_etrn_relay.py --bench [--fsync-ms MS] [--most N]

Nothing but the standard library, loopback and temporary folders is used, and
every port is one the system gave.  The last line says `N passed, N failed,
N skipped`; the exit status is 0 when none failed.

CONTENTS  1 HARNESS  2 GRAMMAR  3 CONFIG  4 SESSION  5 SMUGGLING  6 SCHEDULE
          7 DNS  8 DSN  9 SPOOL  10 DELIVERY  11 RELAY  12 COMMANDS  13 LAYERS
          14 PROOF  15 BENCH
"""
from __future__ import annotations

import argparse
import ast
import base64
import collections
import concurrent.futures
import contextlib
import dataclasses
import copy
import ctypes
import email
import email.policy
import errno
import fcntl
import functools
import gc
import hashlib
import heapq
import hmac
import html.parser
import http.client
import importlib.util
import io
import itertools
import json
import mailbox
import os
import plistlib
import platform
import pwd
import random
import re
import select
import selectors
import shutil
import signal
import smtplib
import socket
import socketserver
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
import warnings
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Set, Tuple, Union
from unittest import mock

try:
    import ssl
except ImportError:             # the tests that need it are skipped
    ssl = None                  # type: ignore[assignment]

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


def unused_port() -> int:
    """For a program that will bind it later, and again after a stop.  Below the ports that
    the system gives to whoever asks for any: what connects meanwhile does not get it."""
    while True:
        port = random.randrange(10000, 32768)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", port))
            return port


def config(text: str = "", domain: str = "", file: str = "/nowhere/etrn.conf") -> etrn.Config:
    """A small configuration: lines for [relay], lines for [domain ourdom.example] and what follows it."""
    return etrn.parse_config("[relay]\nhostname = backup.example.net\n%s\n[domain %s]\n%s\n" % (text, DOMAIN, domain), file)


class Folder(unittest.TestCase):
    """Test cases with a temporary folder of their own."""

    def setUp(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="etrn-test-")
        self.addCleanup(shutil.rmtree, self.folder, True)


def long_run(test: Any) -> Any:
    """Minutes, not seconds: runs with --long only."""
    test.is_long = True
    return test


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
        self._end()
        last, self.sock = self.sock, self._bind()       # bound anew before it is let go: nobody else gets the port
        last.close()

    def _end(self) -> None:
        self.is_up = False
        for sock in [self.sock, *self.clients]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(DEADLINE_S)
        self.clients, self.threads = [], []

    def __enter__(self) -> "Primary":
        return self

    def __exit__(self, *_: Any) -> None:
        self._end()
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
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.clients.append(sock)
            self._spawn(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        try:
            with sock, sock.makefile("rb") as self.lines:
                self._talk(sock, self.lines)
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

    def _say(self, sock: socket.socket, verb: str, argument: str, default: str,
             taken: Callable[[], None] = lambda: None) -> str:
        """Answer; returns the first digit.  `taken` is done before a 2xx leaves: who reads it may look."""
        said = self._said(verb, argument, default)
        if said is HANG:
            while sock.recv(65536):
                pass                    # until somebody closes
            raise OSError
        if said is CUT:
            sock.shutdown(socket.SHUT_RDWR)
            raise OSError
        data = said if isinstance(said, bytes) else str(said).replace("\n", "\r\n").encode("utf-8") + b"\r\n"
        if data.startswith(b"2"):
            taken()
        sock.sendall(data)
        if data.startswith(b"421"):
            raise OSError
        return data[:1].decode("latin-1")

    def on_hello(self, sock: socket.socket) -> None:
        """EHLO was answered."""

    def on_data(self, sock: socket.socket, data: bytes) -> None:
        """A whole message is here; its answer comes next."""

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
                self.on_hello(sock)
            elif verb == "MAIL":
                if sender is not None:
                    sock.sendall(b"503 5.5.1 nested MAIL\r\n")
                elif self._say(sock, verb, argument, "250 2.1.0 ok") == "2":
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
                    parts = []
                    for one in lines:
                        if one == b".\r\n":
                            break
                        parts.append(one[1:] if one.startswith(b".") else one)
                    else:
                        return          # broke off
                    message = (sender or "", recipients, b"".join(parts))
                    self.on_data(sock, message[2])
                    self._say(sock, ".", argument, "250 2.0.0 taken", functools.partial(self.messages.append, message))
                    sender, recipients = None, []
            elif verb == "BDAT":
                data = lines.read(int(argument.split()[0]))
                self.on_data(sock, data)
                if not recipients:
                    sock.sendall(b"503 5.5.1 no valid recipients\r\n")
                else:
                    message = (sender or "", recipients, data)
                    if self._say(sock, ".", argument, "250 2.0.0 taken",
                                 functools.partial(self.messages.append, message)) == "2":
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

    def __init__(self, port: int, source: str = "127.0.0.1") -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), DEADLINE_S, (source, 0))
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
            self.raw((b"\r\n" + data).replace(b"\r\n.", b"\r\n..")[2:] + b".\r\n")
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
COMMAND = [sys.executable, "-c", STARTER, "{}"]     # as a script would be, without compiling it each time


class Relay:
    """etrn_relay.py as a process, in a folder of its own.  start() may follow kill() or stop()."""
    prefix: Sequence[str] = ()          # of its command line

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
        process = subprocess.Popen([*self.prefix, sys.executable, "-c", STARTER, json.dumps(self.limits), "--config", self.file],
                                   stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
        self.process, since = process, len(self.log)
        self.reader = threading.Thread(target=self._read, args=(process, since), daemon=True)
        self.reader.start()
        self.port = int(self.logged(r"started: .*listening on 127\.0\.0\.1:(\d+)", since).group(1))
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

    def read_spool(self) -> None:
        """Returns once it has; what would do harm or tell half the truth until then, it refuses or waits with."""
        self.queue()

    def files(self) -> List[str]:
        return spool_files(self.spool)

    def is_empty(self) -> bool:
        return not self.files()


def spool_files(folder: str) -> List[str]:
    """Names of the queued pairs, without what else a spool holds."""
    return sorted(name for name in os.listdir(folder) if re.fullmatch(r"[0-9A-F]{6,20}\.(eml|json)", name))


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


# -- certificates of nobody, for primary.example, localhost and 127.0.0.1, until 2120

PEMS = {"one.pem": """\
-----BEGIN CERTIFICATE-----
MIIBkDCCATWgAwIBAgIUBZq752QYadyTpOzi8yGa2ZtttOMwCgYIKoZIzj0EAwIw
DjEMMAoGA1UEAwwDb25lMCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAw
WjAOMQwwCgYDVQQDDANvbmUwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAQMNEOd
g6rYPGgqeqnN+WeKom/xUUbs4XaeMSBpOoQ5euI4RtQdirZze1ZNwI7pEcPFYFXL
aqnmtF4lEzG1ZVmio28wbTAPBgNVHRMBAf8EBTADAQH/MA4GA1UdDwEB/wQEAwIC
hDArBgNVHREEJDAigglsb2NhbGhvc3SCD3ByaW1hcnkuZXhhbXBsZYcEfwAAATAd
BgNVHQ4EFgQUMOcjv8l/5zVs9ndZAcP2uEKKsMkwCgYIKoZIzj0EAwIDSQAwRgIh
AMAfyL1Uorp/dXzt5j+S8SNR68L8EVr/3iuqKwcoqC+tAiEAz5bPMpsN2JJLQfaq
D3ULSSMnictwzEkLeN8mrguAqPE=
-----END CERTIFICATE-----
""", "one.key": """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQggPjz3lqmiX2VxwIV
jjzoEF9FDiebsIyjYRj8LOsyrm6hRANCAAQMNEOdg6rYPGgqeqnN+WeKom/xUUbs
4XaeMSBpOoQ5euI4RtQdirZze1ZNwI7pEcPFYFXLaqnmtF4lEzG1ZVmi
-----END PRIVATE KEY-----
""", "two.pem": """\
-----BEGIN CERTIFICATE-----
MIIBkDCCATWgAwIBAgIUQL3Rkpd2W86RgQLBobhG1sZEYNEwCgYIKoZIzj0EAwIw
DjEMMAoGA1UEAwwDdHdvMCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAw
WjAOMQwwCgYDVQQDDAN0d28wWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAQTlSqf
EkFoh0r7wzWt+nua8RyDciO3eP8xD59+VV4Bg7XAMQg3Rn3GI4t75/0vZM1VQnaP
S4xkYH7lZ9J/5bywo28wbTAPBgNVHRMBAf8EBTADAQH/MA4GA1UdDwEB/wQEAwIC
hDArBgNVHREEJDAigglsb2NhbGhvc3SCD3ByaW1hcnkuZXhhbXBsZYcEfwAAATAd
BgNVHQ4EFgQUq3AMYWryfRD4GjwDVuhMcNvvlvwwCgYIKoZIzj0EAwIDSQAwRgIh
AP9VTPesz5kNvFlloCM7aKURrFRQKUiPXekXj1MVeqo2AiEAn/5pCiQGeY4jw7IQ
2egupt8KW0FsFyZ9+7w7J8qkOLI=
-----END CERTIFICATE-----
""", "two.key": """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg9EXkMXwZOJLEzT/m
rSRNPqYZEueS2bLNey5BS3UiU1KhRANCAAQTlSqfEkFoh0r7wzWt+nua8RyDciO3
eP8xD59+VV4Bg7XAMQg3Rn3GI4t75/0vZM1VQnaPS4xkYH7lZ9J/5byw
-----END PRIVATE KEY-----
"""}
LOCKED_KEY = """\
-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHrMFYGCSqGSIb3DQEFDTBJMCgGCSqGSIb3DQEFDDAbBAh0+ghcUl58RAIBATAM
BggqhkiG9w0CCQUAMB0GCWCGSAFlAwQBAgQQvqgYjFmZAm7xLxgyJKRJhASBkGP+
DGRxenJGubVdM8amHyJk796IwA6wdWib1Q3P99eyps09kG0M4SbPi+ESPXHWoS2p
NLx4yB5DtH05ulwgVCox6FbvKjESbLdtELa7a7aP1VZtoTFjdXsduNlBa1bDNwOu
wsrvA954zyk8osSizI8qhntTfsoV4SFCFDNquID7hMPGaJpB3mS9E2Bm46rP5A==
-----END ENCRYPTED PRIVATE KEY-----
"""


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
                ("<>", "", "", ""), ("<a@b.example>", "a", "b.example", ""),
                ("<A@B.Example> SIZE=1", "A", "b.example", " SIZE=1"),
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
                "", "a@b.example", "<", ">", "><", "<@d.example>", "<u@>", "<a b@d.example>", "<x y>", "a b c", "a @ b",
                "<a@b.example",
                "<a@b.example>x", "<a@b.example>NOTIFY=NEVER", "<u@a.example@b.example>", "<.a@d.example>", "<a.@d.example>",
                "<a..b@d.example>", "<u@d.example.>", "<u@d..example>", "<u@-d.example>", "<u@[127.0.0.256]>", "<u@[1.2.3]>",
                "<u@[IPv6:1]>", "<u@[]>", "<a@xn--->", "<%s@d.example>" % ("x" * 65), "<%s@d.example>" % ("é" * 33),
                "<u@%s.example>" % ".".join(["d" * 60] * 5), "<%s@%s>" % ("a" * 75, "b" * 75), "<u@" + "d." * 500 + "d>",
                '<"a@d.example>',
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
        for octets, text in cases(self, [(0, "0B"), (1023, "1023B"), (1024, "1.0K"), (20480, "20K"), (52428800, "50M"),
                                         (1 << 31, "2.0G")]):
            self.assertEqual(etrn.format_size(octets), text)

    def test_names_match_whole_or_on_a_dot_boundary(self) -> None:
        for name, parent, expected in cases(self, [
                ("example.com", "example.com", True), ("a.example.com", "example.com", True),
                ("badexample.com", "example.com", False),
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

    def test_each_fault_of_form_is_told_with_file_and_line(self) -> None:
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
                ("[relay]\nlifetime = 1d\n",
                 "etrn.conf:2: unknown option 'lifetime' (it belongs to [domain NAME] or [defaults])"),
                ("[relay]\npostmaster = a@b.example\n", "etrn.conf:2: unknown option 'postmaster' (it belongs to [bounces])"),
                ("[Relay]\n", "etrn.conf:1: unknown section [Relay] (did you mean 'relay'?)"),
                ("[DEFAULT]\nlifetime = 1d\n", "etrn.conf:1: unknown section [DEFAULT] (did you mean 'defaults'?)"),
                ("[domains a.example]\n", "etrn.conf:1: unknown section [domains a.example] (did you mean 'domain a.example'?)"),
                ("[domaina.example]\n", "etrn.conf:1: unknown section [domaina.example] (did you mean 'domain a.example'?)"),
                ("[domain *.example]\n", "etrn.conf:1: [domain *.example]: '*.example' is not a domain (all subdomains"),
                ("[domain a.example] primary = mx\n", "etrn.conf:1: 'primary = mx' stands behind a [section]")]):
            self.assertTrue(self.error(text).startswith(expected), self.error(text))

    def test_each_fault_of_a_value_is_told_with_file_and_line(self) -> None:
        for text, expected in cases(self, [
                ("[relay]\nmax_recipients = 0\n", "etrn.conf:2: max_recipients: '0' is out of range (1 to 50000)"),
                ("[relay]\nmax_recipients = many\n", "etrn.conf:2: max_recipients: 'many' is not a whole number"),
                ("[relay]\nmax_message_size = 5X\n", "etrn.conf:2: max_message_size: '5X' is not a size"),
                ("[relay]\ncommand_timeout = 2h\n", "etrn.conf:2: command_timeout: '2h' is out of range (1s to 1h)"),
                ("[relay]\ncommand_timeout = soon\n", "etrn.conf:2: command_timeout: 'soon' is not a duration"),
                ("[relay]\nlog_level = loud\n", "etrn.conf:2: log_level: 'loud' is not one of: debug, info"),
                ("[relay]\nlisten = mail.example:25\n",
                 "etrn.conf:2: listen: 'mail.example:25' is not an address of this machine"),
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
                ("[alerts]\nwebhook = ftp://x.example/\n", "etrn.conf:2: webhook: 'ftp://x.example/' is not a web address"),
                ("[domain a.example]\ncutthrough = maybe\n", "etrn.conf:2: cutthrough: 'maybe' is neither yes nor no"),
                ("[domain a.example]\nretry_interval = 1h\nmax_retry_interval = 1m\n",
                 "etrn.conf:3: max_retry_interval is smaller than retry_interval"),
                ("[domain A.Example]\nlifetime = 1d\nusername = u\n", "etrn.conf:3: username needs password beside it"),
                ("[domain a.example]\npassword = p\n", "etrn.conf:2: password needs username beside it"),
                ("[defaults]\nusername = u\n[domain a.example]\n", "etrn.conf:2: username needs password beside it"),
                ("[domain a.example]\nusername = u\npassword = p\n[domain b.example]\nusername = u\npassword = q\n",
                 "etrn.conf:6: username 'u' has another password elsewhere"),
                ("[domain a.example]\nusername = %s\n" % ("u" * 256), "etrn.conf:2: username: longer than 255 octets"),
                ("[relay]\nlisten = 127.0.0.1:25\nodmr_listen = 127.0.0.1:25\n", "etrn.conf:3: odmr_listen: 127.0.0.1:25 is in"),
                ("[bounces]\npostmaster = me\n", "etrn.conf:2: postmaster: 'me' is not a mail address"),
                ("[relay]\nmax_recipients = \u0663\n", "etrn.conf:2: max_recipients: '\u0663' is not a whole number"),
                ("[relay]\nlisten =\n", "etrn.conf:2: listen: is empty"),
                ("[relay]\nlisten = ,\n", "etrn.conf:2: listen: is empty"),
                ("[relay]\nlisten = ::1:25\n", "etrn.conf:2: listen: '::1:25' may or may not end with a port: write [::1]:25"),
                ("[relay]\nhostname = a\x0bb\n", "etrn.conf:2: hostname: 'a\\x0bb' is not a host name"),
                ("[domain a.example]\nprimary = mx, mail.a.example\n", "etrn.conf:2: primary: 'mx' stands alone"),
                ("[domain a.example]\nprimary = mail.a.example:0\n",
                 "etrn.conf:2: primary: 'mail.a.example:0': there is no port 0"),
                ("[domain a.example]\nrecipients = file:\n", "etrn.conf:2: recipients: 'file:' needs a path"),
                ("[domain a.example]\nmax_queue_size = 0\n", "etrn.conf:2: max_queue_size: '0' is out of range"),
                ("[defaults]\nretry_interval = 1h\nmax_retry_interval = 1m\n[domain a.example]\n",
                 "etrn.conf:3: max_retry_interval is smaller than retry_interval"),
                ("[bounces]\npassword = x\n", "etrn.conf:2: password needs username beside it"),
                ("[tls]\nkey = x\n", "etrn.conf:2: key needs certificate beside it")]):
            self.assertTrue(self.error(text).startswith(expected), self.error(text))

    def test_a_fault_is_told_at_its_own_line_wherever_that_is(self) -> None:
        for text, line in cases(self, [
                ("[relay]\nlisten = 127.0.0.1:25,\n  # more\n\n  [::1]:zz\n", 5),        # within a list
                ("[relay]\nlisten =\n  127.0.0.1:25\n  [::1]:25\nzzz = 1\n", 5),          # behind one
                ("[relay]\n  hostname = a\n  zzz = 1\n", 3),                              # a section all indented
                ("[relay]\nhostname = a\n  listen = 25\n", 3),                            # goes on with the line above
                ("[relay]\r\nhostname = a\r\nzzz = 1\r\n", 3),
                ("[relay]\nhostname = a\x0c\nzzz = 1\n", 3),                              # no line ends there
                ("\ufeff[relay]\nzzz = 1\n", 2),
                ("[relay]\nlisten = 25\n; [domain b]\n#zzz = 2\n\n[domain a.example]\nzzz = 1\n", 7)]):
            self.assertEqual(self.error(text).split(":")[:2], ["etrn.conf", str(line)])

    def test_what_people_write_is_understood(self) -> None:
        for text, name, value in cases(self, [
                ("\ufeff[relay]\nhostname = a.example\n", "hostname", "a.example"),
                ("[relay]\r\nHostName: a.example\r\n", "hostname", "a.example"),
                ("[relay]\nlisten = 127.0.0.1:25,   # one\n  # more\n\t[::1]:26 ; two\n  ::1\n", "listen",
                 (("127.0.0.1", 25), ("::1", 26), ("::1", 25))),
                ("[relay]\ncommand_timeout = 1.5m\n", "command_timeout", 90),
                ("[relay]\nmax_message_size = 1g\n", "max_message_size", 1 << 30),
                ("[relay]\nuser = mail # the account\n", "user", "mail"), ("[relay]\nuser = none\n", "user", ""),
                ("[relay]\nlog = stderr ; for systemd\n", "log", "stderr"),
                ("[bounces]\nusername = u\npassword = a;b # %d = c\n", "bounces_password", "a;b # %d = c"),
                ("[bounces]\nusername = u\npassword = file:pw\n", "bounces_password", "file:/x/pw"),
                ("[alerts]\ncommand = logger %(x)s; true # it\n", "alerts_command", "logger %(x)s; true # it")]):
            self.assertEqual(getattr(etrn.parse_config(text, "/x/etrn.conf"), name), value)
        for section, text, name, value in cases(self, [
                ("[domain a.example]", "cutthrough = yes", "cutthrough", True),
                ("[domain\tA.Example]", "xclient = on", "xclient", True),
                ("[ domain  a.example ]", "cutthrough = No", "cutthrough", False),
                ("[domain a.example]", "max_queue_size = none", "max_queue_size", None),
                ("[domain a.example]", "delay_notice = 4h", "delay_notice", 14400),
                ("[domain a.example]", "retry_interval = 2h", "max_retry_interval", 7200),
                ("[domain a.example]", "max_retry_interval = 5s", "retry_interval", 5),
                ("[domain a.example]", "primary = [2001:db8::1]\n  mail.example:26", "primary",
                 (("2001:db8::1", 25), ("mail.example", 26)))]):
            cfg = etrn.parse_config("%s\n%s\n" % (section, text), "/x/etrn.conf")
            self.assertEqual(getattr(cfg.domain("a.example"), name), value)

    def test_a_domain_may_be_listed_and_have_a_section(self) -> None:
        cfg = etrn.parse_config("[relay]\ndomains = A.example b.example\n[domain a.example]\nlifetime = 1h\n", "etrn.conf")
        self.assertEqual([(name, one.lifetime) for name, one in cfg.domains.items()],
                         [("a.example", 3600), ("b.example", 604800)])

    def test_the_machine_is_asked_for_its_name_only_where_none_is_given(self) -> None:
        file = os.path.join(self.folder, "etrn.conf")
        with mock.patch.object(etrn, "fully_qualified_name", side_effect=["machine.example"]):
            for text, name in cases(self, [("[relay]\nhostname = a.example\n", "a.example"), ("", "machine.example")]):
                with open(file, "w", encoding="utf-8") as stream:
                    stream.write(text)
                self.assertEqual(etrn.read_config(file).hostname, name)

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
                ("max_message_size", 50 << 20), ("max_recipients", 1000), ("min_free_space", 100 << 20),
                ("max_connections", 1000),
                ("max_connections_per_client", 50), ("command_timeout", 300), ("bare_newline", "normalize"), ("log", "stderr"),
                ("spool", "/nowhere/spool"), ("bounces_route", "mx"), ("listen", (("0.0.0.0", 25), ("::", 25)))]):
            self.assertEqual(getattr(cfg, name), value)
        for name, value in cases(self, [
                ("primary", "mx"), ("lifetime", 604800), ("etrn", "any"), ("connections", 10), ("probe_interval", 5),
                ("retry_interval", 300), ("max_retry_interval", 3600), ("recovery_grace", 3600), ("max_queue_size", None)]):
            self.assertEqual(getattr(cfg.domain(DOMAIN), name), value)

    def test_flags_can_be_set_as_well_as_cleared(self) -> None:
        for text, value in cases(self, [("yes", True), ("On", True), ("1", True), ("no", False), ("false", False)]):
            cfg = config(domain="cutthrough = %s\nxclient = %s" % (text, text)).domains[DOMAIN]
            self.assertEqual((cfg.cutthrough, cfg.xclient), (value, value))

    def test_comments_stand_behind_values_too(self) -> None:
        cfg = etrn.parse_config("[relay] ; here [x]\n# and\n; there\nmax_recipients = 7   # few\nspool = a#1 #2\n", "/x/e")
        self.assertEqual((cfg.max_recipients, cfg.spool), (7, "/x/a#1"))

    def test_yes_and_no_are_said_in_every_common_way(self) -> None:
        for word, value in cases(self, [("yes", True), ("no", False), ("on", True), ("0", False), ("True", True)]):
            cfg = config("", "xclient = %s\ncutthrough = %s" % (word, word)).domain(DOMAIN)
            self.assertEqual((cfg.xclient, cfg.cutthrough), (value, value))

    def test_a_bare_port_means_all_addresses(self) -> None:
        self.assertEqual(config("listen = 2525").listen, (("0.0.0.0", 2525), ("::", 2525)))
        self.assertEqual(config("listen = localhost:26").listen, (("127.0.0.1", 26), ("::1", 26)))

    def test_odmr_has_a_port_of_its_own_and_passwords_may_be_in_files(self) -> None:
        cfg = etrn.parse_config("[relay]\nodmr_listen = 127.0.0.1, [::1]:367\n[domain a.example]\nprimary = ATRN\n"
                                "username = a user\npassword = file:a.secret\n[domain b.example]\nprimary = etrn\n"
                                "[domain .c.example]\nusername = a user\npassword = file:/x/a.secret\n", "/x/etrn.conf")
        self.assertEqual(cfg.odmr_listen, (("127.0.0.1", 366), ("::1", 367)))
        self.assertEqual([(one.primary, one.username, one.password) for one in cfg.domains.values()], [
            ("atrn", "a user", "file:/x/a.secret"), ("etrn", "", ""), ("mx", "a user", "file:/x/a.secret")])
        for name, username, expected in cases(self, [
                ("a.example", "a user", True), ("x.c.example", "a user", True), ("c.example", "a user", False),
                ("b.example", "", False), ("a.example", "other", False), ("other.example", "a user", False)]):
            self.assertEqual(cfg.is_owned(name, username), expected)
        self.assertEqual([config("", text).has_logins for text in ("", "username = u\npassword = p")], [False, True])

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

CHALLENGE = b"<1896.697170952@postoffice.reston.mci.net>"        # RFC 2195 2, as the next two
NAME, SECRET = "tim", "tanstaaftanstaaf"
DIGEST = base64.b64encode(b"tim b913a602c7eda7a495b4e6e7334d3890").decode()


def judge_login(login: etrn.Login) -> Optional[etrn.Reply]:
    return None if login.username == NAME and login.is_right(SECRET) else etrn.Reply(535, "5.7.8", "authentication failed")


class Player:
    """Stands in for the server: answers what a session asks, and keeps its
    actions with neighbours joined.  What was discarded leaves no trace."""

    def __init__(self, session: etrn.Session, answers: Optional[Dict[str, Any]] = None) -> None:
        self.session = session
        self.answers = dict({"mail": None, "rcpt": None, "commit": etrn.Reply(250, "2.0.0", "queued"),
                             "etrn": etrn.Reply(250, "2.0.0", "started"), "challenge": CHALLENGE, "login": judge_login,
                             "atrn": etrn.Reply(250, "2.0.0", "reversing")}, **(answers or {}))
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
                answer = self.answers[action.what]
                todo.extendleft(reversed(self.session.resume(answer(action.value) if callable(answer) else answer)))
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


def new_session(size_limit: int = 0, domain: str = "", is_odmr: bool = False, tls: Optional[str] = None,
                **relay: Any) -> etrn.Session:
    cfg = config("\n".join("%s = %s" % pair for pair in relay.items()), domain + DIALOGUE_DOMAINS)
    session = etrn.Session(etrn.Door(cfg, size_limit), "192.0.2.7", is_odmr=is_odmr)
    session.tls = tls
    return session


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


SCRIPTS: List[Tuple[str, bytes, Dict[str, Any]]] = []       # name, what is sent, the options it has


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

    SCRIPTS.append((name, sent, options))

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
    C: MAIL FROM:<a@b.example> BODY     S: 501 5.5.4
    C: MAIL FROM:<a@b.example> RET      S: 501 5.5.4
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
script("what was to be sent on is refused without a domain, too", MAIL + "".join(
    "C: RCPT TO:<%s> S: 554 5.7.1\n" % one for one in ("host!user", "user%host", "a!b%c") * 4) + "C: NOOP S: 250")
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
script("a line of 2048 octets is too long and one less is not",
       "S: 220\nC: NOOP %s S: 250\nC: NOOP %s S: 500 5.5.2\nC: NOOP S: 250" % (
    "x" * (2048 - 7), "x" * (2049 - 5)))
script("a line of a million octets is one error", "S: 220\nR: %s S: 500 5.5.2\nR: \\r\\nNOOP\\r\\n S: 250" % ("x" * 1000000))
script("data that looks like an end behind a long line is no command", "S: 220\nR: %s\\nNOOP\\n S: 500 5.5.2 S: 250"
       % ("NOOP " * 1000))
for verb in ("GET", "POST", "CONNECT", "HEAD", "PUT", "OPTIONS"):
    script("the http verb %s ends the session" % verb, "S: 220\nC: %s / HTTP/1.1 S: 521 5.5.1 close\nC: Host: x\nC:\nC: NOOP"
           % verb)
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
script("a nul alone is refused where so configured", DATA + r"""R: a\x00b\r\n.\r\n       S: 550 5.6.0""", bare_newline="reject",
       bodies=[])
script("data over the limit is read to its end and refused there", DATA + "C: %s\nC: .\nS: 552 5.3.4\n" % ("z" * 1100) + r"""
    C: MAIL FROM:<>             S: 250
    C: RCPT TO:<u@ourdom.example>       S: 250
    C: DATA                     S: 354
    C: small
    C: .                        S: 250""", size_limit=1000, bodies=[b"small\r\n"])
script("data of just the limit is taken", DATA + "C: %s\nC: .\nS: 250" % ("z" * 998), size_limit=1000,
       bodies=[b"z" * 998 + b"\r\n"])
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
script("more etrn syntax", READY + "C: ETRN a\\x00b S: 500\nC: ETRN \\xff S: 501\nC: ETRN %s S: 501 5.5.4\n" % ("a" * 1000)
       + "C: ETRN @@a.example S: 501 5.5.4")
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
script("a huge chunk ends the session", RCPT + r"C: BDAT 99999999999999999999 LAST    S: 552 5.3.4 close", size_limit=1000,
       bodies=[])
script("a huge chunk before mail ends the session", READY + r"C: BDAT 99999999999999999999    S: 552 5.3.4 close",
       size_limit=1000)
script("chunks over the limit are refused and their octets swallowed",
       RCPT + "R: BDAT 1001\\r\\n%s S: 552 5.3.4" % ("z" * 1001) + r"""
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
script("stray newlines in bdat are refused where so configured", RCPT + r"R: BDAT 4 LAST\r\na\nb\r S: 550 5.6.0",
       bare_newline="reject",
       bodies=[])

LOGIN = "username = %s\npassword = %s\n" % (NAME, SECRET)
PLAIN = base64.b64encode(("\0%s\0%s" % (NAME, SECRET)).encode()).decode()
KNOWN = READY + "C: AUTH CRAM-MD5 S: 334 %s\nC: %s S: 235 2.7.0\n" % (base64.b64encode(CHALLENGE).decode(), DIGEST)
script("auth is unknown where nobody has a name", READY + r"""
    C: AUTH CRAM-MD5            S: 502 5.5.1
    C: ATRN                     S: 502 5.5.1""")
script("auth as in rfc 2195, and not twice", KNOWN + r"""
    C: AUTH CRAM-MD5            S: 503 5.5.1
    C: EHLO again               S: 250
    C: AUTH CRAM-MD5            S: 503 5.5.1
    C: ETRN ourdom.example      S: 250 2.0.0
    C: ATRN                     S: 502 5.5.1""", domain=LOGIN)
script("auth allows nothing but etrn and atrn", KNOWN + r"""
    C: MAIL FROM:<a@sender.example> AUTH=<>     S: 250
    C: RCPT TO:<u@other.example>        S: 554 5.7.1
    C: RCPT TO:<u@ourdom.example>       S: 250""", domain=LOGIN)
script("auth out of order and out of form", r"S: 220 C: AUTH CRAM-MD5 S: 503 5.5.1" + "\n" + MAIL.partition("\n")[2] + r"""
    C: AUTH CRAM-MD5            S: 503 5.5.1
    C: RSET                     S: 250
    C: AUTH                     S: 501 5.5.4
    C: AUTH LOGIN               S: 504 5.5.4
    C: AUTH PLAIN               S: 538 5.7.11
    C: AUTH CRAM-MD5 abc=       S: 501 5.7.0
    C: auth cram-md5            S: 334
    C: *                        S: 501 5.7.0
    C: AUTH CRAM-MD5            S: 334
    C: not base 64!             S: 501 5.5.2
    C: AUTH CRAM-MD5            S: 334
    C: QUIT                     S: 535 5.7.8
    C: NOOP                     S: 250""", domain=LOGIN)
script("the third failed auth ends the session", READY + r"""
    C: AUTH CRAM-MD5            S: 334
    C: dGltIGI5MTNhNjAyYzdlZGE3YTQ5NWI0ZTZlNzMzNGQzODkx S: 535 5.7.8
    C: AUTH CRAM-MD5            S: 334
    C: dGlt                     S: 535 5.7.8
    C: AUTH CRAM-MD5            S: 334
    C: =                        S: 501 5.5.2
    C: AUTH CRAM-MD5            S: 334
    C:                          S: 421 4.7.0 close
    C: NOOP""", domain=LOGIN)
script("an auth that cannot be judged is not counted",
       READY + "C: AUTH CRAM-MD5 S: 334\nC: dGlt S: 454 4.7.0\n" * 4 + "C: NOOP S: 250", domain=LOGIN,
       answers={"login": etrn.Reply(454, "4.7.0", "later")})
script("a response that is too long ends the exchange alone",
       READY + "C: AUTH CRAM-MD5 S: 334\nC: %s S: 500 5.5.6\nC: NOOP S: 250" % ("A" * 3000), domain=LOGIN)
script("auth plain within tls", READY + "C: AUTH PLAIN S: 334 \nC: %s S: 235 2.7.0" % PLAIN, domain=LOGIN, tls="TLSv1.3")
script("auth plain with its response at once", READY + "C: AUTH PLAIN %s S: 235 2.7.0" % PLAIN, domain=LOGIN, tls="TLSv1.3")
script("auth plain that is wrong", READY + "".join("C: AUTH PLAIN %s S: %s\n" % (
    text if text == "=" else base64.b64encode(text.encode()).decode(), code) for text, code in (
        ("\0tim\0tanstaaftanstaa", "535 5.7.8"), ("other\0tim\0tanstaaftanstaaf", "535 5.7.8"), ("=", "421 close"))),
       domain=LOGIN, tls="TLSv1.3")
script("atrn needs auth, wherever it stands", r"""S: 220
    C: ATRN ourdom.example      S: 530 5.7.0
    C: EHLO x                   S: 250
    C: ATRN                     S: 530 5.7.0
    C: ETRN ourdom.example      S: 502 5.5.1""", domain=LOGIN, is_odmr=True)
script("the odmr port has its own commands alone", READY + "".join("C: %s S: 502 5.5.1\n" % verb for verb in (
    "MAIL FROM:<>", "RCPT TO:<u@ourdom.example>", "DATA", "VRFY x", "EXPN x", "BDAT 5", "XCLIENT", "TURN")) + r"""
    C: NOOP                     S: 250
    C: RSET                     S: 250
    C: HELP                     S: 214
    C: QUIT                     S: 221 close""", domain=LOGIN, is_odmr=True)
script("atrn out of form", KNOWN + r"""
    C: ATRN @ourdom.example     S: 501 5.5.4
    C: ATRN a..b                S: 501 5.5.4
    C: ATRN ourdom.example,     S: 501 5.5.4
    C: ATRN a.example b.example S: 501 5.5.4""", domain=LOGIN, is_odmr=True)
script("atrn refused leaves the session as it was", KNOWN + r"""
    C: ATRN                     S: 453 4.0.0
    C: ATRN a.example, b.example        S: 453
    C: QUIT                     S: 221 close""", domain=LOGIN, is_odmr=True,
       answers={"atrn": etrn.Reply(453, "4.0.0", "You have no mail")})


class Logins(unittest.TestCase):
    def test_what_is_offered_depends_on_names_tls_and_port(self) -> None:
        for options, auth, others in cases(self, [
                ({}, [], True), ({"domain": LOGIN}, ["AUTH CRAM-MD5"], True),
                ({"domain": LOGIN, "tls": "TLSv1.3"}, ["AUTH CRAM-MD5 PLAIN"], True),
                ({"domain": LOGIN, "is_odmr": True}, ["AUTH CRAM-MD5"], False)]):
            lines = [line[4:] for line in play(b"EHLO x\r\n", **options).actions[0][1].decode().split("\r\n")[1:-1]]
            self.assertEqual([line for line in lines if line.startswith("AUTH")], auth)
            self.assertEqual(("ETRN" in lines, "ATRN" in lines, "PIPELINING" in lines), (others, not others, others))

    def test_an_atrn_that_is_granted_ends_the_session_and_hands_on_what_came_behind_it(self) -> None:
        opening = b"EHLO x\r\nAUTH CRAM-MD5\r\n%s\r\n" % DIGEST.encode()
        for argument, domains in cases(self, [(b"", ()), (b" OurDom.Example", (DOMAIN,)), (b" a.example, b.example",
                                                                                          ("a.example", "b.example"))]):
            player = play_all_ways(self, opening + b"ATRN" + argument + b"\r\n", domain=LOGIN, is_odmr=True)
            self.assertEqual(player.actions[-3:], [("atrn", domains), ("send", b"250 2.0.0 reversing\r\n"), ("reverse", (b"",))])
        player = play(opening + b"ATRN\r\n220 customer\r\n", domain=LOGIN, is_odmr=True)
        self.assertEqual(player.actions[-1], ("reverse", (b"220 customer\r\n",)))

    def test_starttls_forgets_who_it_was(self) -> None:
        session = new_session(domain=LOGIN)
        session.door.has_tls = True
        player = Player(session, {"starttls": ("TLSv1.3", "x")})
        player.receive(b"EHLO x\r\nAUTH CRAM-MD5\r\n%s\r\nSTARTTLS\r\n" % DIGEST.encode())
        player.receive(b"EHLO x\r\nAUTH PLAIN %s\r\n" % PLAIN.encode())
        self.assertEqual([reply[:3] for reply in player.replies], ["220", "250", "334", "235", "220", "250", "235"])

    def test_failures_are_noted_in_one_line_that_fail2ban_knows(self) -> None:
        name = base64.b64encode("x\u2028] 1.2.3.4 b913".encode()).decode()
        player = play(b"EHLO x\r\nAUTH CRAM-MD5\r\n%s\r\n" % name.encode(), domain=LOGIN)
        note, = (value[0] for what, value in player.actions if what == "note")
        self.assertRegex(note, r"\Awarning: unknown\[192\.0\.2\.7\]: SASL CRAM-MD5 authentication failed: .*sasl_username=x")
        self.assertTrue(note.isprintable())

    def test_a_login_is_right_or_not(self) -> None:
        digest = hmac.new(b"pass", CHALLENGE, "md5").hexdigest().encode()
        for parsed, expected in cases(self, [
                (etrn.parse_cram(b"a b " + digest, CHALLENGE), ("a b", True)),
                (etrn.parse_cram(b"u " + digest.upper(), CHALLENGE), ("u", True)),
                (etrn.parse_cram(b"u " + digest[:-1], CHALLENGE), ("u", False)),
                (etrn.parse_cram(b"u pass", CHALLENGE), ("u", False)), (etrn.parse_cram(digest, CHALLENGE), None),
                (etrn.parse_cram(b"\xff " + digest, CHALLENGE), None),
                (etrn.parse_cram(b"u" * 256 + b" " + digest, CHALLENGE), None),
                (etrn.parse_plain(b"\0u\0pass"), ("u", True)), (etrn.parse_plain(b"u\0u\0pass"), ("u", True)),
                (etrn.parse_plain(b"\0u\0Pass"), ("u", False)), (etrn.parse_plain(b"x\0u\0pass"), None),
                (etrn.parse_plain(b"u\0pass"), None), (etrn.parse_plain(b"\0u\0pass\0"), None), (etrn.parse_plain(b""), None)]):
            self.assertEqual(parsed and (parsed.username, parsed.is_right("pass")), expected)


# -- dialogues that other servers' suites have, 55 of them, by their number in our notes; what deviates says so

def portable(number: int, text: str, ours: str = "", **options: Any) -> None:
    """`ours`: where our answer is another than those of the server it comes from, and why."""
    script("portable %02d%s" % (number, " ours" if ours else ""), text, **options)


def each(prologue: str, commands: Sequence[str], code: str) -> str:
    return prologue + "".join("C: %s S: %s\n" % (command, code) for command in commands)


def each_mail(paths: Sequence[str], code: str) -> str:
    return READY + "".join("C: MAIL FROM:%s S: %s\nC: RSET S: 250\n" % (path, code) for path in paths)


portable(1, r"S: 220 C: \x80FAIL S: 500")
portable(2, r"S: 220 C: HELO S: 501 C: EHLO S: 501")
portable(3, r"S: 220 C: HELO a S: 250 C: HELO b S: 250 C: EHLO c S: 250 C: HELO d S: 250")
portable(4, r"S: 220 C: EHLO client.example S: 250")
portable(5, r"S: 220 C: NOOP S: 250 C: NOOP ok S: 250")
portable(6, r"S: 220 C: QUIT oops S: 221 close", "an argument is ignored, as Postfix does")
portable(7, r"S: 220 C: HELP S: 214 C: HELP MAIL S: 214")
portable(8, r"S: 220 C: EXPN a@b S: 502 5.5.1")
portable(9, r"S: 220 C: MAIL FROM:<a@b.example> S: 503 5.5.1 C: RCPT TO:<u@ourdom.example> S: 503 5.5.1 C: DATA S: 503 5.5.1")
portable(10, each(READY, ["MAIL", "MAIL <a@b.example>", "MAIL FROM:", "MAIL LALA: <>"], "501"))
portable(11, r"S: 220 C: HELO a S: 250 C: MAIL FROM:<a@b.example> SIZE=10000 S: 250", "RFC 1870 does no harm after HELO")
portable(12, each_mail([r"<a@b.example> SIZE=10000", r"  <a@b.example>   SIZE=10000\x20\x20"], "250"))
portable(13, each_mail(["<> SIZE 10000", "<> SIZE", "<> #$%=!@#", "<> SIZE = 10000"], "501") + "C: MAIL FROM:<> FOO=BAR S: 555")
portable(14, READY + "C: MAIL FROM:<> SIZE=10001 S: 552 5.3.4", size_limit=10000)
portable(15, each_mail(["<> SIZE=abc", "<> SIZE=-1"], "501") + "C: MAIL FROM:<> SIZE=99999999999999999999 S: 552",
         size_limit=10000)
portable(16, MAIL + "C: MAIL FROM:<b@c.example> S: 503")
portable(17, each_mail(["<>", " <>"], "250"))
portable(18, READY + "C: MAIL FROM: Anne <a@b.example> S: 501")
portable(19, each_mail(['<""@d.example>', '<"Fred Bloggs"@d.example>', r'<"Joe\\\\Blow"@d.example>', '<"Abc@def"@d.example>',
                        '<"much.more unusual"@d.example>', "<a+b@d.example>", "<customer/department=shipping@d.example>",
                        "<$A12345@d.example>", "<!def!xyz%abc@d.example>", "<_somename@d.example>", "<x@d>", "<a'b@d.example>",
                        "<admin@mailserver1>", '<"()<>[]:,;@!#$%&*+-/=?^_`{}| ~.a"@d.example>', "<u@[127.0.0.1]>",
                        "<u@[IPv6:::1]>", "<u@[ipv6:2001:db8::1]>", "<@r1.example,@r2.example:u@d.example>"], "250"))
portable(20, each_mail(["<@d.example>", "<u@>", "a b c", "a @ b", "<x y>", "><", "<a@b.example", "<a b@c.example>"], "501"))
script("more senders that are none", each_mail(["<<a@b.example>>", "<.a@b.example>", "<a..b@c.example>", "<a.@b.example>",
                                                '<"a"b"@c.example>', "<a@b..example>", "<a@-b.example>", "<a@[1.2.3]>"], "501"))
portable(21, READY + "C: MAIL FROM:<a@xn---> S: 501")
portable(22, READY + "C: MAIL FROM:<%s@%s> S: 501" % ("x" * 75, ".".join(["y" * 75] * 4)))
portable(23, each_mail(["<> BODY=FOOBAR"], "501") + "C: MAIL FROM:<> BODY 9BIT S: 5")
portable(24, READY + "C: MAIL FROM:<> SMTPUTF8=YES S: 501")
portable(25, READY + r"C: MAIL FROM:<\xff@d.example> S: 501 C: MAIL FROM:<\xc3\xa9@d.example> S: 553 5.6.7")
portable(26, READY + "C: RCPT TO:<u@ourdom.example> S: 503")
portable(27, each(MAIL, ["RCPT", "RCPT <a@b.example>", "RCPT TO:", "RCPT TO:bart <a@b.example>", "RCPT LALA:"], "501"))
portable(28, MAIL + "C: RCPT TO:<u@ourdom.example> FOOBAR S: 555")
portable(29, each(MAIL, ["RCPT TO:<Postmaster>", "RCPT TO:<postmaster>", "RCPT TO:<POSTMASTER>"], "250"))
portable(30, each(MAIL, ["RCPT TO:<u@other.example>"], "554 5.7.1"))
portable(31, RCPT + "C: RCPT TO:<v@ourdom.example> S: 452 4.5.3 C: DATA S: 354 C: . S: 250", max_recipients=1)
portable(32, MAIL + "C: RCPT TO:<u@ourdom.example> S: 451", answers={"rcpt": etrn.Reply(451, "4.3.0", "later")})
portable(33, MAIL + "C: RSET S: 250 C: RSET FOO S: 250 C: DATA S: 503", "an argument is ignored")
portable(34, MAIL + "C: RSET S: 250 C: RCPT TO:<u@ourdom.example> S: 503\n" + "".join(
    "C: MAIL FROM:<> S: 250 C: RCPT TO:<u@ourdom.example> S: 250\n"
    "C: %s S: 250 C: RCPT TO:<u@ourdom.example> S: 503 C: DATA S: 503\n" % greeting for greeting in ("HELO x", "EHLO x", "RSET")))
portable(35, r"S: 220 C: VRFY a@b.example S: 252 C: VRFY <a@b.example> S: 252 C: VRFY Fred S: 252 C: VRFY S: 501 5.5.4"
         r" C: VRFY @@ S: 501 5.1.3 C: VRFY a@ S: 501 5.1.3")
portable(36, READY + "C: DATA S: 503 C: MAIL FROM:<> S: 250 C: DATA S: 503\n"
         "C: RCPT TO:<u@ourdom.example> S: 250 C: DATA FOOBAR S: 501")
portable(37, "S: 220\nC:\nS: 500\nC: NOOP S: 250")
portable(38, "S: 220\nC: %s S: 500\nC: %s S: 500\nC: NOOP S: 250" % ("x" * 513, "x" * 1000000))
portable(39, "S: 220\n" + "C: FOO S: 500 5.5.2\n" * 10 + "C: FOO S: 421 4.7.0 close", "eleven, of whatever kind")
portable(40, "S: 220 C: GET / HTTP/1.1 S: 521 5.5.1 close")
portable(41, DATA + "R: .\\r\\n S: 250", bodies=[b""])
portable(42, DATA + r"R: test\r\nmail\rdelimiters\nsaved\r\n.\r\n S: 250", "stray newlines are mended, or refused: 550",
         bodies=[b"test\r\nmail delimiters\r\nsaved\r\n"])
portable(43, DATA + "C: ..From\nC: ...x\nC: ..\nC: ..This\nC: .\nS: 250", bodies=[b".From\r\n..x\r\n.\r\n.This\r\n"])
portable(44, DATA + "C: %s\nC: .\nS: 552 5.3.4\n"
         "C: MAIL FROM:<> S: 250 C: RCPT TO:<u@ourdom.example> S: 250 C: DATA S: 354\nC: %s\nC: .\nS: 250"
         % ("z" * 99, "z" * 98), size_limit=100, bodies=[b"z" * 98 + b"\r\n"])
portable(45, DATA + "C: %s" % ("z" * 200), size_limit=100)
portable(46, DATA + "C: %s\nC: .\nS: 250" % ("y" * 1001), "lines of any length pass unchanged", bodies=[b"y" * 1001 + b"\r\n"])
portable(47, DATA + "C: %s\nC: %s\nC: .\nS: 552" % ("z" * 600, "y" * 1001), size_limit=500, bodies=[])
portable(53, r"S: 220 C: HELO a\x00b S: 500")
portable(54, r"S: 220 C: STARTTLS S: 502 C: EHLO x S: 250 C: STARTTLS S: 502")
portable(55, READY + r"C: ETRN S: 500 5.5.4 C: ETRN a.example b.example S: 501 5.5.4 C: ETRN a..b S: 501"
         r" C: ETRN ourdom.example S: 250 C: MAIL FROM:<> S: 250 C: ETRN ourdom.example S: 503",
         "two names are not a domain: 501; the rest in Etrn")
ELSEWHERE = {48: "Smuggling", 49: "Attacks.test_who_breaks_off_leaves_nothing_behind",
             50: "Refusals.test_who_is_idle_too_long_is_told_421",
             51: "Attacks.test_floods_are_answered_and_hold_nobody_up",      # ours: no limit but of errors
             52: "Dialogues.test_pipelined_commands_are_answered_in_order"}

script("the eleventh error of any kind and no refusal counts", READY + r"""
    C: MAIL FROM:<a@b.example> SIZE=99999       S: 552
    C: MAIL FROM:<\xc3\xa9@b.example>           S: 553
    C: MAIL FROM:<a@b.example>                  S: 250
    C: RCPT TO:<u@other.example>                S: 554
    C: RCPT TO:<a%%b@ourdom.example>            S: 554
    C: RCPT TO:<\xc3\xa9@ourdom.example>        S: 553
    C: DATA                     S: 503
    C: DATA                     S: 503
    C: MAIL FROM:<>             S: 503
    C: RCPT TO:<>               S: 501
    C: RCPT TO:<u@ourdom.example> X=Y           S: 555
    C: WHAT                     S: 500
    C: EXPN x                   S: 502
    C: NOOP \x01                S: 500
    C: %s                       S: 500
    C: ETRN ourdom.example      S: 503
    C: BDAT x                   S: 501
    C: STARTTLS                 S: 502
    C: RCPT TO:<u@other.example>                S: 554
    C: HELO                     S: 421 4.7.0 close""" % ("x" * 3000), size_limit=10000)
script("any 421 ends the session", READY + "C: MAIL FROM:<> S: 421 close C: NOOP",
       answers={"mail": etrn.Reply(421, "4.3.2", "bye")})
script("after a refused chunk there is a way on by rset or the last chunk",
       RCPT + "R: BDAT 2000\\r\\n%s S: 552" % ("z" * 2000) + r"""
    C: MAIL FROM:<>             S: 503
    C: RSET                     S: 250
    C: MAIL FROM:<>             S: 250
    C: RCPT TO:<u@ourdom.example>       S: 250
    R: BDAT 1500\r\n%s          S: 552
    R: BDAT 3\r\nabc            S: 552
    C: DATA                     S: 503
    C: BDAT 0 LAST              S: 552
    C: MAIL FROM:<>             S: 250""" % ("z" * 1500), size_limit=1000, bodies=[])
script("a chunk that is over the limit alone ends the session", RCPT + "C: BDAT 2001 S: 552 close", size_limit=1000)
script("hops are counted in a bdat message too",
       RCPT + "R: BDAT 2900 LAST\\r\\n%s S: 554 5.4.6" % (r"Received: from a by b; xxxx\r\n" * 100),
       bodies=[])
script("a body without a header has no hops", DATA + "C:\nC: text\n" + "C: Received: from a by b; x\n" * 120 + "C:\nC: .\nS: 250")
script("nothing but nuls is cut off as well", DATA + "R: %s S: 552 5.3.4 close" % ("\\x00" * 80000), size_limit=1000, bodies=[])
script("without a limit any size is taken", READY + "C: MAIL FROM:<> SIZE=99999999999999999999 S: 250")
script("names need smtputf8 as well as local parts", READY + r"""
    C: MAIL FROM:<a@m\xc3\xbcnchen.example>     S: 553 5.6.7
    C: MAIL FROM:<a@b.example>                  S: 250
    C: RCPT TO:<u@m\xc3\xbcnchen.example>       S: 553 5.6.7
    C: RCPT TO:<u@ourdom.example> ORCPT=utf-8;\xc3\xa9@x        S: 553 5.6.7
    C: RCPT TO:<u@xn--mnchen-3ya.example>       S: 250""")
script("dsn parameters in and out of form", MAIL + "".join("C: RCPT TO:<u@ourdom.example> %s S: %s\n" % pair for pair in (
    ("NOTIFY=", "501"), ("NOTIFY=NEVER", "250"), ("NOTIFY=success,delay,failure", "250"), ("NOTIFY=SUCCESS,SUCCESS", "501"),
    ("NOTIFY=NEVER,NEVER", "501"), ("NOTIFY=DELAY NOTIFY=DELAY", "501"), ("ORCPT=rfc822", "501"), ("ORCPT=;x", "501"),
    ("ORCPT=rfc822;a+3Db", "250"), ("ORCPT=rfc822;a+3db", "501"), ("ORCPT=rfc822;a+", "501"), ("ORCPT=rfc822;a=b", "501"),
    ("ORCPT=rfc822;%s" % ("x" * 600), "501"), ("NOTIFY=DELAY ORCPT=rfc822;x", "250"))))
script("what clients may not pretend to be", each(READY, [
    "XCLIENT ADDR=192.0.2.1", "XFORWARD ADDR=192.0.2.1", "PROXY TCP4 192.0.2.1 192.0.2.2 1 2", "XEXCH50 1"], "500 5.5.2"))


class Portable(unittest.TestCase):
    def test_all_fifty_five_are_there(self) -> None:
        here = {int(name.split("_")[2]) for name in dir(Dialogues) if name.startswith("test_portable_")}
        self.assertEqual(here | set(ELSEWHERE), set(range(1, 56)))
        for name in cases(self, ELSEWHERE.values()):
            self.assertTrue(all(hasattr(globals()[name.partition(".")[0]], part) for part in name.split(".")[1:]))

    def test_no_reply_precedes_the_question(self) -> None:
        """Each command waits for what the server is asked, and gets its own answer."""
        chance = random.Random(7)
        session = new_session()
        session.greet()
        session.receive(b"EHLO x\r\n")
        expected, sent = [], b""
        for number in range(200):
            code = chance.choice(["250", "450", "550", "452"])
            expected.append("%s 2.1.%d" % (code, number))
            sent += b"RCPT TO:<u%d@ourdom.example>\r\n" % number
        session.receive(b"MAIL FROM:<>\r\n")
        session.resume(None)
        replies, actions = b"", session.receive(sent)
        for text in expected:
            self.assertIsInstance(actions[-1], etrn.Ask)
            replies += b"".join(one.data for one in actions if isinstance(one, etrn.Send))
            actions = session.resume(None if text[0] == "2" else etrn.Reply(int(text[:3]), text[4:], "no"))
        replies += b"".join(one.data for one in actions if isinstance(one, etrn.Send))
        self.assertEqual([line[:3] for line in replies.decode().splitlines()], [text[:3] for text in expected])


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
        self.assertEqual((transaction.ret, transaction.envid, transaction.body, transaction.size),
                         ("FULL", "e+2B", "8BITMIME", 9))
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
            hops = player.session.transaction.hops
            held = len(player.session.buffer) + (len(hops.line + hops.field) if hops is not None else 0)
            self.assertLess(held, etrn.COMMAND_MAX + 2 * etrn.HEADER_FIELD_KEPT)
        player.receive(b".\r\n")
        self.assertLess(player.largest, 100000)
        self.assertEqual(len(player.bodies[0]), sent)

    def test_no_reply_comes_before_the_end_of_data_over_the_limit(self) -> None:
        player = play(b"HELO x\r\nMAIL FROM:<>\r\nRCPT TO:<u@ourdom.example>\r\nDATA\r\n" + b"x" * 1500, size_limit=1000)
        self.assertEqual(player.replies[-1][:3], "354")
        self.assertEqual(player.session.buffer, b"")

    def test_rejections_are_noted_in_one_line_that_cannot_be_forged(self) -> None:
        player = play(b"HELO x\xe2\x80\xae\r\nMAIL FROM:<\"a b\"@b.example>\r\nRCPT TO:<u\xc2\x85@other.example>\r\n"
                      b"RCPT TO:<u@other.example>\r\n")
        notes = [value[0] for what, value in player.actions if what == "note"]
        self.assertTrue(all(note.isprintable() for note in notes), notes)
        self.assertEqual([note[:54] for note in notes], ["NOQUEUE: reject: RCPT from unknown[192.0.2.7]: 553 5.6",
                                                         "NOQUEUE: reject: RCPT from unknown[192.0.2.7]: 554 5.7"])
        self.assertIn(": 554 5.7.1 <u@other.example>: ", notes[1])

    def test_our_received_field_is_in_form_whatever_the_client_said(self) -> None:
        for helo, protocol in cases(self, [("EHLO mx.b.example", b"ESMTP"), ("HELO (x); by y", b"SMTP"),
                                           ("EHLO é\u202e", b"ESMTP")]):
            session = new_session()
            Player(session).receive(helo.encode() + b"\r\nMAIL FROM:<>\r\nRCPT TO:<u@ourdom.example>\r\n")
            field = etrn.format_received(session, session.transaction, "ABC123", 1764000000.0)
            text = field.decode("ascii")
            self.assertRegex(text, r"(?s)\AReceived: from \S+ \(unknown \[192\.0\.2\.7\]\)\r\n"
                             r"\tby backup\.example\.net .*with %s id ABC123"
                             r"\r\n\tfor <u@ourdom\.example>;\r\n\t[^\r\n]+\r\n\Z" % protocol.decode())
            self.assertIsNotNone(email.utils.parsedate_to_datetime(text.rpartition(";")[2].strip()))


# == 5. SMUGGLING ==============================================================
# Only CRLF . CRLF ends data, and nothing else leaves as a line end.

VECTORS = [b"\n.\n", b"\n.\r", b"\r.\n", b"\r.\r", b"\n.\r\n", b"\r.\r\n", b"\r\n.\n", b"\r\n.\r", b"\r\n.\r\r\n",
           b"\r\r\n.\r\r\n",
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
            self.check(stream, [(offset,) for offset in range(len(stream))], mended(unstuffed(raw)),
                       ["220", "250", "250", "250", "354", "250"])

    def test_no_vector_within_bdat_nor_between_two_chunks(self) -> None:
        for vector, front in cases(self, itertools.product(VECTORS, FRONTS)):
            raw = front + vector + EVIL + b"\r\n.\r\n"
            for size in range(len(front), len(front) + len(vector) + 1):
                stream = OPENING + b"BDAT %d\r\n%sBDAT %d LAST\r\n%sQUIT\r\n" % (size, raw[:size], len(raw) - size, raw[size:])
                self.check(stream, [(), range(len(stream))], mended(raw), ["220", "250", "250", "250", "250", "250", "221"])

    def test_every_vector_is_refused_at_the_true_end_where_so_configured(self) -> None:
        for vector, front, how in cases(self, itertools.product(VECTORS, FRONTS, ("DATA", "BDAT"))):
            raw = front + vector + EVIL + b"\r\n"
            stream = OPENING + (b"DATA\r\n" + raw + b".\r\n" if how == "DATA" else b"BDAT %d LAST\r\n" % len(raw)
                                + raw) + b"NOOP\r\n"
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
                "<u@ourdom.example.evil.example>", "<u@evilourdom.example>", "<u@example>", "<u@our_dom.example>",
                "<%2e%2e%2f@ourdom.example>",
                "<u@wild.example>", "<u@xwild.example>"]):
            self.assertEqual([reply[:9] for reply in self.answer(b"RCPT TO:" + path.encode())], ["554 5.7.1"])

    def test_what_is_no_path_is_refused(self) -> None:
        for path in cases(self, [
                b"<u@other.example@ourdom.example>", b"<u@ourdom.example@other.example>", b"<u@ourdom.example.>", b"<u@>",
                b"<@ourdom.example>", b"<>", b"<u>", b"u@ourdom.example", b"<u@ourdom.example> <v@other.example>",
                b"<u@ourdom.example>,<v@other.example>", b"<u@ourdom.example>NOTIFY=NEVER",
                b"<u@ourdom.example\x00.evil.example>",
                b"<u@ourdom.example\t>", b"<a\rRCPT TO:<v@other.example>@ourdom.example>", b"<../../etc/x@ourdom.example>",
                b"<$(id)@ourdom.example>", b"<" + b"x" * 65 + b"@ourdom.example>", b"<u@" + b"x." * 120 + b"ourdom.example>",
                b"<" + b"x" * 1000 + b"@ourdom.example>", "<\u202eu@ourdom.example>".encode(),
                "<e\u0301@ourdom.example>".encode(),
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
                ("<u@xn--mnchen-3ya.example>", "u@xn--mnchen-3ya.example"),
                ("<u@XN--mnchen-3ya.example>", "u@xn--mnchen-3ya.example"),
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

    def took_one(self) -> None:
        self.site.on_taken(self.clock.now)

    def taken(self, most: int = 1000) -> List[str]:
        return [entry.id for entry in self.site.take(most, self.clock.now)]

    def test_a_primary_without_mail_is_not_tried(self) -> None:
        self.assertFalse(self.site.wanted(self.clock.now))
        self.assertIsNone(self.site.wake(self.clock.now))

    def test_a_down_primary_is_tried_soon_and_then_every_probe_interval(self) -> None:
        for interval in cases(self, [5, 1, 60]):
            self.configure("probe_interval = %ds" % interval, 1)
            pauses = [self.probe() for _ in range(400)]
            self.assertEqual((pauses[0], pauses[-1]), (0, interval))
            self.assertEqual(set(pauses[1:etrn.QUICK_PROBES]), {etrn.PROBE_FIRST_S})
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
        for _ in range(200):
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
        self.took_one()
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

    def test_a_quick_primary_gets_no_more_connections_than_it_can_keep_waiting(self) -> None:
        for pace_s, connections in cases(self, [(0.001, etrn.QUICK_CONNECTIONS), (0.1, 10)]):
            self.configure("", 1000)
            self.prove()
            self.site.pace_s = 0.0
            for _ in range(200):
                self.site.on_taken(self.clock.now, pace_s)
                self.clock.advance(0.01)
                while self.site.wanted(self.clock.now):
                    self.site.on_started(self.clock.now)
                    self.site.on_connected(self.clock.now)
            self.assertEqual(self.site.open, connections)

    def test_few_messages_need_one_connection_to_a_quick_primary_and_several_to_a_slow_one(self) -> None:
        for pace_s, share, opened in cases(self, [(0.001, 3, 1), (0.3, 2, 4)]):
            self.configure("connections = 4", 6)
            self.prove()
            for _ in range(10):
                self.site.on_taken(self.clock.now, pace_s)
            connections = 1
            while self.site.wanted(self.clock.now):
                self.site.on_started(self.clock.now)
                self.site.on_connected(self.clock.now)
                connections += 1
            self.assertEqual((connections, self.site.share()), (opened, share))
            self.assertEqual(len(self.taken(self.site.share())), share)
            self.assertEqual(self.site.share(), share)          # what is with connections counts, too

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

    def test_what_is_being_written_down_keeps_no_canary_waiting(self) -> None:
        """A full disk takes no record before mail has left it."""
        self.configure(count=10)
        self.site.start(next(iter(self.site.entries.values())))
        self.probe("")
        canary, = self.taken(16)
        self.assertEqual(self.taken(16), [])            # that one is with a connection
        self.site.drop(canary)
        self.clock.advance(60)
        self.assertEqual(len(self.taken(16)), 1)

    def test_a_deferred_message_pauses_longer_each_time(self) -> None:
        self.assertEqual([self.site.pause(n, self.clock.now) for n in (1, 2, 3, 4, 5, 6, 2000)],
                         [300, 600, 1200, 2400, 3600, 3600, 3600])

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

    def test_a_primary_that_hung_up_on_a_message_was_not_away_and_gets_others_first(self) -> None:
        self.configure(count=3)
        self.probe("")
        canary, = self.site.take(16, self.clock.now)
        self.site.defer(canary, self.clock.now, 3000)
        self.assertTrue(self.site.on_closed(self.clock.now, "lost connection"))
        self.probe("")
        second, = self.site.take(16, self.clock.now)
        self.assertNotEqual(second.id, canary.id)
        self.took_one()
        self.site.drop(second.id)
        self.assertNotIn(canary.id, self.taken())

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
        self.assertEqual(self.site.expired(self.clock.now), [])         # not before it was tried, now that it may be
        self.assertEqual(self.site.attempts(entry), 10)
        for _ in range(3):
            self.assertEqual(self.site.expired(self.clock.now), [])
            self.probe()
        self.assertEqual(self.site.expired(self.clock.now), [entry])

    def test_a_jump_of_the_clock_alone_expires_nothing(self) -> None:
        self.add()
        for _ in range(10):
            self.probe()
        self.clock.jump(30 * 86400)
        self.site.on_clock_jump(self.clock.now, 30 * 86400)
        self.assertEqual(self.site.expired(self.clock.now), [])
        self.assertEqual(self.site.attempts(self.site.entries["A00000"]), 10)
        for _ in range(3):
            self.probe()
        self.assertEqual(len(self.site.expired(self.clock.now)), 1)

    def test_a_5xx_is_final_after_the_grace_only(self) -> None:
        self.configure("recovery_grace = 1h", 2)
        self.probe()
        self.prove()
        for minutes, since, was_good, expected in cases(self, [
                (0, None, False, False), (59, None, False, False), (0, 59, False, False), (0, 60, False, True),
                (60, None, False, True),
                (60, None, True, False), (60, 59, True, False), (60, 60, True, True)]):
            now = etrn.Now(self.clock.mono, self.clock.wall + 60 * minutes)
            self.assertEqual(self.site.is_final(now, since if since is None else now.wall - 60 * since, was_good), expected)

    def test_a_primary_that_cannot_be_reached_by_us_is_left_alone(self) -> None:
        for primary, home, reachable in cases(self, [("atrn", "", False), ("etrn", "", False), ("etrn", "192.0.2.9", True),
                                                     ("mx", "", True), ("192.0.2.9", "", True)]):
            self.configure("primary = " + primary, 1)
            self.site.home = home
            now = self.clock.now
            self.assertEqual([self.site.wanted(now), self.site.may_ask(now), self.site.may_cut_through(now),
                              not self.site.waits_for, not self.site.trouble], [reachable] * 5)
            self.site.on_heard(now)
            self.assertEqual(self.site.is_known_up(now), reachable)
        self.configure("primary = atrn", 2)
        for _ in range(2):
            self.assertTrue(self.site.flush(self.clock.now))        # never "under way already"
        self.assertIsNone(self.site.wake(self.clock.now))

    def test_a_primary_that_comes_for_its_mail_gets_all_of_it_without_a_canary(self) -> None:
        self.configure("primary = atrn", 30)
        self.site.is_collecting = True
        self.assertIsNone(self.site.on_came(self.clock.now))
        self.assertIs(self.site.state, etrn.Primary.UP)
        self.assertEqual(len(self.taken(16)), 16)
        self.assertFalse(self.site.wanted(self.clock.now))
        for entry in self.site.entries.values():
            if entry.state is etrn.State.DELIVERING:
                self.site.defer(entry, self.clock.now, 300)
        self.clock.advance(400)
        self.assertIsNone(self.site.wake(self.clock.now))       # it comes to its turn without the loop asking all the time
        self.site.on_left(self.clock.now, "lost connection", True)
        self.assertEqual((self.site.state, self.site.trouble, self.site.open), (etrn.Primary.UNKNOWN, "lost connection", 0))
        self.assertTrue(self.site.flush(self.clock.now))
        self.assertEqual(self.site.count[etrn.State.ACTIVE], 30)

    def test_a_site_that_can_be_reached_is_not_tried_while_its_primary_is_here(self) -> None:
        self.configure("primary = 192.0.2.9", 2)
        self.probe()
        self.clock.advance(60)
        self.site.is_collecting = True
        self.assertEqual(self.site.on_came(self.clock.now), 60)
        self.assertFalse(self.site.wanted(self.clock.now))
        self.site.on_left(self.clock.now, "", True)
        self.assertEqual((self.site.state, self.site.wanted(self.clock.now)), (etrn.Primary.UP, True))

    def test_mail_that_is_not_collected_expires_though_nothing_was_tried(self) -> None:
        self.configure("primary = atrn", 1)
        self.clock.advance(days=6.9)
        self.assertEqual(self.site.expired(self.clock.now), [])
        self.clock.advance(days=0.2)
        self.assertEqual(len(self.site.expired(self.clock.now)), 1)

    def test_mail_found_old_at_the_start_may_still_be_collected_for_a_while(self) -> None:
        self.configure("primary = atrn")
        self.site.add(etrn.Entry("A00000", 100, 1.0, 2.0), self.clock.now)
        self.assertEqual(self.site.expired(self.clock.advance(etrn.UNCOLLECTED_S - 1)), [])
        self.assertEqual(len(self.site.expired(self.clock.advance(2))), 1)

    def test_a_jump_of_the_clock_alone_expires_nothing_that_waits_to_be_collected(self) -> None:
        for days in cases(self, [30, -30]):
            self.configure("primary = atrn", 1)
            self.clock.advance(days=5)
            self.clock.jump(days * 86400)
            self.site.on_clock_jump(self.clock.now, days * 86400.0)
            self.site.keep_ages(days * 86400, self.clock.now)
            self.clock.advance(days=1.9)
            self.assertEqual(self.site.expired(self.clock.now), [])
            self.assertAlmostEqual(self.clock.wall - self.site.oldest(), 6.9 * 86400)
            self.clock.advance(days=0.2)
            self.assertEqual(len(self.site.expired(self.clock.now)), 1)

    def test_the_address_of_an_etrn_holds_for_its_section(self) -> None:
        scheduler = etrn.Scheduler(config("", "primary = etrn\n[domain .wild.example]\nprimary = etrn\n[domain x.example]"))
        one, two, other = (scheduler.site(name, self.clock.now) for name in (DOMAIN, "a.wild.example", "x.example"))
        for name, moved in cases(self, [("a.wild.example", ["a.wild.example"]), ("b.wild.example", []), (DOMAIN, [DOMAIN])]):
            sites = scheduler.move(scheduler.config_of(name), "192.0.2.9", self.clock.now)
            self.assertEqual([site.name for site in sites], moved)
        later = scheduler.site("b.wild.example", self.clock.now)
        self.assertEqual([site.home for site in (one, two, later, other)], ["192.0.2.9"] * 3 + [""])
        scheduler.reconfigure(config("", "primary = atrn"), self.clock.now)
        self.assertEqual([bool(site.waits_for) for site in (one, other)], [True, False])

    def test_names_of_sites_match_whole_or_on_dot_boundaries(self) -> None:
        cfg = etrn.parse_config("[relay]\ndomains = example.com, a.example.com, badexample.com, .wild.example, x.y.example\n",
                                "/x/c")
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
                ("c.wild.example", True), ("wild.example", False), ("@wild.example", True), ("@net", False),
                ("other.example", False)]):
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


class Sums(unittest.TestCase):
    """What the loop keeps count of, so that nobody has to look at every message."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.scheduler = etrn.Scheduler(etrn.parse_config("[relay]\ndomains = a.example, b.example, c.example\n", "/x/c"))
        self.sites = [self.scheduler.site(name, self.clock.now) for name in ("a.example", "b.example", "c.example")]

    def counted(self) -> Tuple[int, int, int]:
        """The same, by looking at every message."""
        seen: Dict[str, etrn.Entry] = {}
        held = set()
        for site in self.sites:
            seen.update(site.entries)
            held |= {id for id, entry in site.entries.items() if entry.state is etrn.State.HOLD}
        return len(seen), sum(entry.size for entry in seen.values()), len(held)

    def test_sums_equal_a_count_whatever_comes_and_goes(self) -> None:
        chance = random.Random(1985)
        for step in range(2000):
            id = "A%05d" % chance.randrange(60)
            holding = self.scheduler.holding(id)
            if not holding or chance.random() < 0.2:
                size = holding[0].entries[id].size if holding else chance.randrange(1, 5000)
                for site in chance.sample(self.sites, chance.randint(1, 3)):
                    if id not in site.entries:
                        site.add(etrn.Entry(id, size, self.clock.wall, self.clock.wall + site.cfg.lifetime), self.clock.now)
                holding = self.scheduler.holding(id)
                if len(holding) > 1:
                    self.scheduler.share(id, holding)
            elif chance.random() < 0.5:
                site = chance.choice(holding)
                site.hold(site.entries[id], not site.entries[id].hold)
            else:
                self.scheduler.drop(chance.choice(holding), id)
            self.row = step
            self.assertEqual(self.scheduler.messages(), self.counted())
        for site in self.sites:
            for id in list(site.entries):
                self.scheduler.drop(site, id)
        self.assertEqual((self.scheduler.messages(), self.scheduler.shared), ((0, 0, 0), {}))

    def test_the_oldest_is_known_without_looking_at_each(self) -> None:
        chance = random.Random(2645)
        site = self.sites[0]
        for step in range(1500):
            now = self.clock.advance(seconds=chance.randrange(3000))
            if chance.random() < 0.6:
                received = now.wall - chance.choice([0, 0, 0, 86400 * 3])       # some were copied in
                site.add(etrn.Entry("A%05d" % step, 1, received, received + site.cfg.lifetime), now)
            elif site.entries:
                site.drop(chance.choice([min(site.entries), chance.choice(list(site.entries))]))
            if chance.random() < 0.1:
                site.expired(now)       # none was tried: all stay
            self.row = step
            self.assertEqual(site.oldest(), min((entry.received for entry in site.entries.values()), default=None))
        self.assertTrue(site.overdue)

    def test_mail_expires_although_the_clock_went_forth_and_back(self) -> None:
        site = self.sites[0]
        wall = self.clock.wall
        site.add(etrn.Entry("A00000", 1, wall, wall + site.cfg.lifetime), self.clock.now)
        self.assertEqual(site.expired(self.clock.jump(30 * 86400.0)), [])
        self.assertEqual(site.expired(self.clock.jump(-30 * 86400.0)), [])
        site.entries["A00000"].tries = etrn.ATTEMPTS_MIN
        self.assertEqual(len(site.expired(self.clock.advance(days=8))), 1)


# == 7. DNS ====================================================================

class Packets(unittest.TestCase):
    """Built by hand; nothing but DnsError may come of them."""

    HEAD = struct.pack("!HHHHHH", 7, 0x8180, 1, 1, 0, 0)
    ASKED = wire_name("a.example") + struct.pack("!HH", etrn.MX, 1)

    def parse(self, packet: bytes, kind: int = etrn.MX, name: str = "a.example") -> Optional[etrn.Answer]:
        return etrn.parse_answer(packet, 7, name, kind)

    def test_answers_are_read(self) -> None:
        for kind, data in cases(self, [(etrn.A, ["192.0.2.1", "192.0.2.2"]), (etrn.AAAA, ["2001:db8::1"]),
                                       (etrn.MX, [(10, "m1.example"), (20, "m2.example"), (0, "")]),
                                       (etrn.PTR, ["host.example"])]):
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
                b"", good[:11], dns_answer(8, "a.example", etrn.MX), dns_answer(7, "b.example", etrn.MX),
                dns_answer(7, "a.example", etrn.A),
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
                ("a circle of two", b"\1a" + pointer(at + 4) + pointer(at)), ("half of one", b"\xc0"),
                ("a label of kind 01", b"\x41a\0"),
                ("a label of kind 10", b"\x81a\0"), ("a label beyond the packet", b"\x3fab"), ("no end", b"\1a"),
                ("300 octets", (b"\x3f" + b"x" * 63) * 5 + b"\0")]):
            self.assertRaises(etrn.DnsError, self.parse, self.HEAD + self.ASKED + name + (tail if what != "half of one" else b""))
        for data in cases(self, [b"", b"\0\1", b"\0\1\5ab", b"\0\1" + pointer(0x3fff)]):
            answer = wire_name("a.example") + struct.pack("!HHIH", etrn.MX, 1, 9, len(data)) + data
            self.assertRaises(etrn.DnsError, self.parse, dns_answer(7, "a.example", etrn.MX, [answer]))
        for kind, data in cases(self, [(etrn.A, b"123"), (etrn.A, b"12345"), (etrn.AAAA, b"1234")]):
            answer = wire_name("a.example") + struct.pack("!HHIH", kind, 1, 9, len(data)) + data
            packet = dns_answer(7, "a.example", kind, [answer])
            self.assertRaises(etrn.DnsError, self.parse, packet, kind)

    def test_a_name_that_runs_over_its_record_is_refused(self) -> None:
        short = wire_name("a.example") + struct.pack("!HHIH", etrn.MX, 1, 9, 3) + b"\0\1\1"
        packet = dns_answer(7, "a.example", etrn.MX, [short, record("a.example", etrn.MX, (9, "m.example"))])
        self.assertRaises(etrn.DnsError, self.parse, packet)

    def test_counts_that_lie_are_refused(self) -> None:
        packet = dns_answer(7, "a.example", etrn.MX)
        self.assertRaises(etrn.DnsError, self.parse, packet[:6] + b"\xff\xff" + packet[8:])

    def test_every_prefix_of_an_answer_is_harmless(self) -> None:
        for kind, data in cases(self, [(etrn.A, "192.0.2.1"), (etrn.AAAA, "::1"), (etrn.MX, (1, "m.example")),
                                       (etrn.PTR, "p.example")]):
            packet = dns_answer(7, "a.example", kind, [record("a.example", etrn.CNAME, "b.example"),
                                                       record("b.example", kind, data)])
            for size in range(len(packet)):
                try:
                    self.assertIsNone(self.parse(packet[:size], kind))
                except etrn.DnsError:
                    pass
            self.assertEqual(self.parse(packet, kind).records, [data])

    def test_random_damage_does_no_harm(self) -> None:
        chance = random.Random(2)
        good = dns_answer(7, "a.example", etrn.MX, [record("a.example", etrn.CNAME, "b.example"),
                                                    record("b.example", etrn.MX, (1, "m.example"))])
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
            ("m1.example", etrn.AAAA): ["2001:db8::1"], ("m2.example", etrn.A): ["192.0.2.2"],
            ("bare.example", etrn.A): ["192.0.2.3"],
            ("null.example", etrn.MX): [(0, "")],
            ("ours.example", etrn.MX): [(5, "m1.example"), (10, "backup.example.net"), (10, "m2.example")],
            ("only.example", etrn.MX): [(1, "backup.example.net"), (2, "m2.example")],
            ("gone.example", etrn.MX): [(1, "none.example")],
            ("half.example", etrn.MX): [(1, "none.example"), (2, "m2.example")], ("backup.example.net", etrn.A): ["192.0.2.99"],
            ("public.example", etrn.MX): [(1, "m3.example"), (2, "m2.example")],
            ("m3.example", etrn.A): ["127.0.0.1", "10.0.0.1", "9.9.9.9"]}

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
        for broken in cases(self, [{"rcode": 2}, {"rcode": 5}, {"mangle": lambda packet: None},
                                   {"mangle": lambda packet: packet[:20]},
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
        for domain, expected in cases(self, [("only.example", "loops back"), ("null.example", "null MX"),
                                             ("none.example", "no such name"),
                                             ("gone.example", "none.example")]):
            with self.assertRaisesRegex(etrn.PeerError, expected):
                self.route(domain)

    def test_the_last_route_is_used_when_the_dns_fails(self) -> None:
        last = (etrn.Hop("old.example", "192.0.2.7", 25),)
        self.assertEqual(self.route("none.example", last_route=last), ["old.example[192.0.2.7]:25"])
        self.assertIn("no such name", self.warning)

    def test_equals_of_this_host_are_cut_however_it_is_known(self) -> None:
        zone = dict(self.ZONE)
        zone["alias.example", etrn.MX] = [(5, "m1.example"), (10, "m2.example"), (10, "us.example"), (20, "m3.example")]
        zone["us.example", etrn.A] = ["192.0.2.99"]
        zone["twin.example", etrn.MX] = [(10, "m2.example"), (10, "us.example")]
        server = self.dns(zone=zone)
        us = (etrn.Endpoint("192.0.2.99", 25),)
        for _ in range(8):              # equals come in random order
            self.assertEqual(self.route("alias.example", server, listeners=us),
                             ["m1.example[192.0.2.1]:25", "m1.example[2001:db8::1]:25"])
            with self.assertRaisesRegex(etrn.PeerError, "loops back"):
                self.route("twin.example", server, listeners=us)

    def test_equal_preferences_are_shuffled_and_lower_ones_go_first(self) -> None:
        zone = {("x.example", etrn.MX): [(20, "c.example"), (10, "a.example"), (10, "b.example")]}
        zone.update({("%s.example" % name, etrn.A): ["192.0.2.%d" % number] for number, name in enumerate("abc", 1)})
        server = self.dns(zone=zone)
        seen = {tuple(hop[0] for hop in self.route("x.example", server)) for _ in range(40)}
        self.assertEqual(seen, {("a", "b", "c"), ("b", "a", "c")})

    def test_a_null_mx_beside_real_ones_is_no_null_mx(self) -> None:
        server = self.dns(zone={("x.example", etrn.MX): [(0, ""), (10, "m.example")], ("m.example", etrn.A): ["192.0.2.1"]})
        self.assertEqual(self.route("x.example", server), ["m.example[192.0.2.1]:25"])

    def test_a_host_without_an_address_is_said_to_be_that(self) -> None:
        server = self.dns(zone={("x.example", etrn.MX): [(10, "m.example")], ("m.example", etrn.MX): []})
        with self.assertRaisesRegex(etrn.PeerError, "no address is known for m.example"):
            self.route("x.example", server)
        self.assertEqual(self.route("x.example", server, last_route=(etrn.Hop("m.example", "192.0.2.9", 25),)),
                         ["m.example[192.0.2.9]:25"])

    def test_a_nameserver_that_fails_at_ipv6_costs_neither_the_route_nor_much_time(self) -> None:
        def mangle(packet: bytes) -> Optional[bytes]:
            return None if server.asked[-1][2] == etrn.AAAA else packet
        server = self.dns(mangle=mangle)
        with shorten(DNS_TRY_S=0.1):
            self.assertEqual(self.resolver(server).addresses("m1.example"), ["192.0.2.1"])
        self.assertLessEqual(sum(kind == etrn.AAAA for _, _, kind in server.asked), 2)

    def test_an_mx_record_of_any_octets_is_a_name_that_does_not_resolve(self) -> None:
        def octets(owner: str, kind: int, data: bytes) -> bytes:
            return wire_name(owner) + struct.pack("!HHIH", kind, 1, 60, len(data)) + data
        for label in cases(self, [b"a\xffb", b"a b", b"\0\0\0", b"-a-"]):
            server = self.dns(zone={("x.example", etrn.MX): [b"\0\x0a\x03" + label + b"\0"]})
            with mock.patch.object(sys.modules[__name__], "record", octets), \
                    self.assertRaisesRegex(etrn.PeerError, "no such name|not a host name"):
                self.route("x.example", server)

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
    plan = etrn.Plan(DOMAIN, cfg, primary, "backup.example.net", etrn.Resolver(()), listeners=(), last_route=())
    return plan._replace(**values)


MAKE_PLAN = make_plan


# == 8. DSN ====================================================================

HOSTILE = ["550 5.1.1 x\r\nBcc: v@other.example\r\n\r\nhello", "550 \r\n--BOUND/backup.example.net--\r\n",
           "550 \x00\x1b[2J \u202e",
           "550 caf\xe9 \ud83d \U0001f600", "x" * 100000, "550 =?utf-8?q?a?=\n\tb", ""]


def notice(reports: Sequence[etrn.Report], original: bytes = MESSAGE, full: bool = False, **sidecar: Any) -> Tuple[Any, bytes]:
    """A notice, parsed by a stranger, and its bytes."""
    people = [(one.address, DOMAIN, "", "", 1764600000.0) for one in reports]
    fields = etrn.make_sidecar("ABCDEF", "mail", "a@sender.example", people,
                               1764000000.0, {"address": "192.0.2.7", "helo": "x", "tls": None})
    fields = dict(fields, **sidecar)
    data = etrn.format_notice("backup.example.net", fields["sender"], fields, reports, original, full,
                              1764500000.0, "BOUND", "mid")
    return email.message_from_bytes(data, policy=email.policy.default), data


def report(**values: Any) -> etrn.Report:
    whole = etrn.Report("u@" + DOMAIN, "failed", "5.1.1", "550 5.1.1 no such user", "mail.ourdom.example", "", 3, 1764400000.0)
    return whole._replace(**values)


class Notices(unittest.TestCase):
    def test_a_notice_is_a_multipart_report(self) -> None:
        message, _ = notice([report(orcpt="rfc822;u+2Bx@old.example"), report(address="v@" + DOMAIN, response="timeout",
                                                                              remote="",
                                                                             status="4.4.7")], envid="QQ+2B1")
        self.assertEqual((message.get_content_type(), message.get_param("report-type")), ("multipart/report", "delivery-status"))
        self.assertEqual((message["To"].addresses[0].addr_spec, message["Auto-Submitted"]), ("a@sender.example", "auto-replied"))
        self.assertEqual(len(message.defects), 0)
        text, status, headers = message.iter_parts()
        self.assertEqual([part.get_content_type() for part in message.iter_parts()],
                         ["text/plain", "message/delivery-status", "text/rfc822-headers"])
        self.assertIn("u@" + DOMAIN, text.get_content())
        whole, first, second = status.get_payload()
        self.assertEqual((whole["Reporting-MTA"], whole["Original-Envelope-Id"]), ("dns; backup.example.net", "QQ+1"))
        self.assertIsNotNone(email.utils.parsedate_to_datetime(whole["Arrival-Date"]))
        for name, value in cases(self, [
                ("Final-Recipient", "rfc822; u@" + DOMAIN), ("Original-Recipient", "rfc822; u+x@old.example"),
                ("Action", "failed"),
                ("Status", "5.1.1"), ("Remote-MTA", "dns; mail.ourdom.example"),
                ("Diagnostic-Code", "smtp; 550 5.1.1 no such user")]):
            self.assertEqual(first[name], value)
        self.assertIsNotNone(email.utils.parsedate_to_datetime(first["Last-Attempt-Date"]))
        self.assertEqual((second["Status"], second["Remote-MTA"], second["Diagnostic-Code"]),
                         ("4.4.7", None, "X-etrn-relay; timeout"))
        self.assertEqual(headers.get_payload(decode=True), MESSAGE)

    def test_the_whole_message_is_returned_where_asked(self) -> None:
        message, _ = notice([report()], full=True)
        part = list(message.iter_parts())[2]
        self.assertEqual(part.get_content_type(), "message/rfc822")
        self.assertEqual(part.get_payload(0)["Subject"], "one")

    def test_expiry_says_how_long_was_tried_and_why(self) -> None:
        message, _ = notice([report(status="4.4.7", response="connect to 192.0.2.1: Connection refused", remote="", attempts=41)])
        text = next(message.iter_parts()).get_content()
        for words in cases(self, ["for 5 days and 18 hours", "41 attempts", "Connection refused", "mail service is not running",
                                  "send it again later"]):
            self.assertIn(words, " ".join(text.split()))

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
            self.assertTrue(data.isascii())
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
        message, data = notice([report(address="é@" + DOMAIN, orcpt="utf-8;ü@x.example")])
        self.assertIn(b"Final-Recipient: utf-8; \\x{E9}@" + DOMAIN.encode(), data)
        self.assertIn(b"Original-Recipient: utf-8; \\x{FC}@x.example\r\n", data)
        text, status, _ = message.iter_parts()
        self.assertEqual((status.get_content_type(), message.get_param("report-type")),
                         ("message/global-delivery-status", "delivery-status"))
        self.assertIn("<é@%s>" % DOMAIN, text.get_content())

    def test_an_internationalized_sender_and_message_stay_what_they_are(self) -> None:
        message, data = notice([report()], "Subject: caf\u00e9\r\n".encode(), sender="\u00e9@sender.example", smtputf8=True)
        self.assertIn("To: <\u00e9@sender.example>\r\n".encode(), data)
        self.assertEqual(message["Content-Transfer-Encoding"], "8bit")
        self.assertEqual(list(message.iter_parts())[2].get_content_type(), "message/global-headers")
        message, _ = notice([report()], "Subject: caf\u00e9\r\n\r\nx\r\n".encode(), True, smtputf8=True)
        self.assertEqual(list(message.iter_parts())[2].get_content_type(), "message/global")

    def test_every_notice_is_well_formed_for_a_strict_reader(self) -> None:
        table = itertools.product(("failed", "delayed", "relayed"), (False, True), ("", "\u00e9"), [*HOSTILE, "x" * 380 + " y"])
        for action, full, accent, response in cases(self, table):
            one = report(action=action, response=response, address="u%s@%s" % (accent, DOMAIN))
            _, data = notice([one, report(action=action)],
                             b"Subject: one\r\nX-Long: " + b"y" * 5000 + b"\r\n\r\nHello.\r\n", full)
            message = email.message_from_bytes(data, policy=email.policy.strict)
            self.assertEqual([part.get_content_maintype() for part in message.get_payload()][:2], ["text", "message"])
            if not full:
                self.assertLessEqual(max(map(len, data.split(b"\r\n"))), 998)
            ours = data[:data.index(b"Undelivered Message")]
            self.assertLessEqual(max(map(len, ours.split(b"\r\n"))), 420)
            self.assertIsNone(re.search(rb"\r(?!\n)|(?<!\r)\n|\0", data))

    def test_a_notice_belongs_to_the_thread_of_its_message_and_believes_no_odd_id(self) -> None:
        for header, expected in cases(self, [
                (b"Message-ID: <a.b@x.example>\r\n", "<a.b@x.example>"), (b"message-id:<a@b>\r\nSubject: x\r\n", "<a@b>"),
                (b"Message-ID: <a b@x>\r\n", None), (b"Message-ID: <a@x>\r\n Bcc: v@x\r\n", "<a@x>"),
                (b"Message-ID: \r\n <a@x>\r\n", None), (b"Subject: x\r\n\r\nMessage-ID: <a@x>\r\n", None),
                (b"Message-ID: <%s@x>\r\n" % (b"y" * 300), None), (b"Message-ID: <\xe9@x>\r\n", None)]):
            message, _ = notice([report()], header)
            self.assertEqual((message["References"], message["In-Reply-To"]), (expected, expected))

    def test_what_an_operator_returned_was_neither_refused_nor_waited_for(self) -> None:
        words = "Returned by the postmaster of the backup mail server"
        for response, there, absent in cases(self, [(words, "postmaster of the backup mail server returned it", "collected"),
                                                    (etrn.UNCOLLECTED, "to be collected", "returned it")]):
            message, _ = notice([report()._replace(status="5.0.0", response=response, remote="", attempts=0)])
            text = " ".join(list(message.iter_parts())[0].get_content().split())
            self.assertIn(there, text)
            self.assertNotIn(absent, text)
            self.assertNotIn("refused the message", text if response == words else "")

    def test_a_layman_is_told_what_happened_and_what_to_do(self) -> None:
        for status, response, happened, to_do in cases(self, [
                ("5.1.1", "550 5.1.1 unknown", "no such mailbox", "letter by letter"),
                ("4.4.7", "452 4.2.2 over quota", "mailbox is full", "send it again later"),
                ("5.3.4", "message of 9 octets exceeds the primary's limit of 5", "larger than", "smaller parts"),
                ("5.6.7", "the primary does not offer SMTPUTF8, which this message needs", "letters that", "plain letters"),
                ("5.7.1", "554 5.7.1 spam", "does not want this message", "by telephone"),
                ("4.4.7", "connect to h[192.0.2.1]:25: Connection timed out", "does not answer", "later"),
                ("4.4.7", "connect to h[192.0.2.1]:25: No route to host", "cannot be reached", "later"),
                ("4.4.7", "no such name: x.example", "cannot be found", "later"),
                ("4.4.7", "mail for x loops back to this host: no MX host", "other than its backup servers", "later"),
                ("4.4.7", "x.example has a null MX record: it says it takes no mail", "takes no mail", "ask"),
                ("4.4.7", "lost connection with h", "broke the conversation off", "later"),
                ("4.4.7", "450 4.7.1 greylisted", "does not want", "ask"), ("4.4.7", "451 later", "put the message off", "later"),
                ("5.0.0", "550 no", "refused the message", "ask"), ("5.2.1", "550 5.2.1 disabled", "takes no mail", "ask")]):
            message, _ = notice([report(status=status, response=response)])
            text = " ".join(next(message.iter_parts()).get_content().split())
            for words in (happened, to_do, "It was tried for 5 days and 18 hours (3 attempts, the last time on",
                          "will not be tried again"):
                self.assertIn(words, text)


# == 9. SPOOL ==================================================================
# "S1" to "S9" are the states of the table in the spool's banner.

class Stopped(BaseException):
    """The process is gone, in the middle of a file operation."""


class Disk:
    """Stands for the module `os` within etrn_relay.  It counts the operations
    that change files and lets the `at`th (or, with `forever`, each from there
    on) fail with an errno, or stops the process before or `after` it.

    It also remembers what was synced: power_cut() makes the folder that a
    power cut would leave, with unsynced octets and unsynced names lost."""

    COUNTED = ("open", "write", "fsync", "close", "rename", "unlink", "truncate")

    def __init__(self, folder: str, at: int = -1, fault: int = 0, after: bool = False, forever: bool = False) -> None:
        self.folder, self.at, self.fault, self.after, self.forever = folder, at, fault, after, forever
        self.count = 0
        self.is_stopped = False
        self.is_harmless = False        # what failed was the closing of a folder: nothing was written through it
        self.open_files: Dict[int, str] = {}
        self.written: Dict[int, bytes] = {}     # inode: octets
        self.safe: Dict[int, bytes] = {}        # the same, as of the last fsync
        self.names: Dict[str, int] = {}         # of the spool directory, as of its last fsync
        for name in spool_files(folder):
            path = os.path.join(folder, name)
            self.names[name] = os.stat(path).st_ino
            with open(path, "rb") as file:
                self.written[self.names[name]] = self.safe[self.names[name]] = file.read()

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.COUNTED:
            return real
        return lambda *arguments, **options: self._call(name, real, arguments, options)

    def _call(self, name: str, real: Callable[..., Any], arguments: Any, options: Any) -> Any:
        if self.is_stopped:
            raise Stopped
        number, self.count = self.count, self.count + 1
        is_hit = number == self.at or (self.forever and number > self.at >= 0)
        if is_hit and self.fault:
            if name == "close":
                real(*arguments)                # NFS reports errors there, and the descriptor is gone all the same
                self.is_harmless = os.path.isdir(self.open_files.pop(arguments[0], None) or "")
            raise OSError(self.fault, os.strerror(self.fault))
        if is_hit and not self.after:
            self.is_stopped = True
            raise Stopped
        try:
            result = real(*arguments, **options)
            self._remember(name, arguments, result)
            return result
        finally:
            if is_hit:
                self.is_stopped = True
                raise Stopped

    def _remember(self, name: str, arguments: Any, result: Any) -> None:
        if name == "open":
            self.open_files[result] = arguments[0]
            inode = os.fstat(result).st_ino
            if arguments[1] & (os.O_CREAT | os.O_TRUNC):
                self.written[inode] = b""
            if arguments[1] & os.O_CREAT:
                self.safe.pop(inode, None)
        elif name == "close":
            self.open_files.pop(arguments[0], None)
        elif name == "write":
            self.written[os.fstat(arguments[0]).st_ino] += bytes(arguments[1])[:result]
        elif name == "fsync":
            inode = os.fstat(arguments[0]).st_ino
            if inode in self.written:
                self.safe[inode] = self.written[inode]
            elif inode == os.stat(self.folder).st_ino:
                self.names = {one: os.stat(os.path.join(self.folder, one)).st_ino for one in spool_files(self.folder)}

    def close_all(self) -> int:
        """What the kernel does for a process that is gone; returns the number of files left open."""
        count = len(self.open_files)
        for fd in self.open_files:
            os.close(fd)
        self.open_files.clear()
        return count

    def power_cut(self, folder: str) -> str:
        os.makedirs(folder)
        for name, inode in self.names.items():
            with open(os.path.join(folder, name), "wb") as file:
                file.write(self.safe.get(inode, b""))
        return folder


def sidecar_of(id: str, recipients: Sequence[str] = ("user@" + DOMAIN,), **values: Any) -> Dict[str, Any]:
    now = time.time()
    people = [(one, one.rpartition("@")[2], "", "", now + 86400) for one in recipients]
    fields = etrn.make_sidecar(id, "mail", "a@sender.example", people,
                               now, {"address": "192.0.2.7", "helo": "x", "tls": None})
    return dict(fields, **values)


def store(spool: etrn.Spool, id: str, data: bytes = MESSAGE, **values: Any) -> Optional[OSError]:
    """Accept a message; None when it may be acknowledged."""
    return spool.commit([(etrn.Draft(id), [data], sidecar_of(id, **values))])[0]


def fork_clerk(spool: etrn.Spool) -> etrn.Clerk:
    """It has what is replaced in etrn_relay now."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)     # of forks beside threads; a clerk needs nothing of theirs
        return etrn.Clerk(spool, lambda: None)


def opened(folder: str) -> etrn.Spool:
    spool = etrn.Spool(folder)
    spool.open()
    return spool


def recover(folder: str) -> Dict[str, bytes]:
    """What a new start finds: the queued messages, intact.  One that is not fails the test with Corrupt."""
    spool = opened(folder)
    try:
        out = {}
        for id in spool.names():
            message = spool.read_message(id, spool.read_sidecar(id))
            out[id] = b"".join(message.blocks())
            message.close()
        return out
    finally:
        spool.close()


class SpoolCase(Folder):
    """With a spool, and ways to let it down."""

    def setUp(self) -> None:
        super().setUp()
        self.path = os.path.join(self.folder, "spool")
        opened(self.path).close()
        self.serial = 0

    def fresh(self) -> str:
        """Another empty folder's name."""
        self.serial += 1
        return os.path.join(self.folder, "spool%d" % self.serial)

    def operations(self, act: Callable[[etrn.Spool], Any], before: Callable[[etrn.Spool], Any]) -> int:
        disk, _ = self.attempt(act, before)
        return disk.count

    def attempt(self, act: Callable[[etrn.Spool], Any], before: Callable[[etrn.Spool], Any], **fault: Any) -> Tuple[Disk, Any]:
        """`act` on a spool that `before` prepared, with a disk that fails; returns what it returned, or Stopped."""
        path = self.fresh()
        spool = opened(path)
        before(spool)
        disk = Disk(path, **fault)
        result: Any
        with mock.patch.object(etrn, "os", disk):
            try:
                result = act(spool)
            except Stopped:
                result = Stopped
        self.left_open = disk.close_all()
        spool.close()
        return disk, result

    def every_stop(self, act: Callable[[etrn.Spool], Any],
                   before: Callable[[etrn.Spool], Any]) -> Iterator[Tuple[Any, Dict[str, bytes]]]:
        """Stop `act` before and after each file operation, and not at all; then
        start again, both after a crash and after a power cut."""
        count = self.operations(act, before)
        self.assertGreater(count, 3)
        for at, after in itertools.product(range(count + 1), (False, True)):
            disk, result = self.attempt(act, before, at=at, after=after)
            self.assertEqual(result is Stopped, at < count)
            self.row = (at, after)
            yield result, recover(disk.power_cut(self.fresh()))
            yield result, recover(disk.folder)
        del self.row


class SpoolStates(SpoolCase):
    def put(self, where: str, name: str, content: bytes, age_s: float = 0) -> None:
        path = os.path.join(self.path, where, name)
        with open(path, "wb") as file:
            file.write(content)
        os.utime(path, (time.time() - age_s,) * 2)

    def tree(self) -> Dict[str, List[str]]:
        return {where: [name for name in sorted(os.listdir(os.path.join(self.path, where))) if "." in name
                        and name != "state.json"]
                for where in ("", "incoming", "done", "corrupt")}

    def test_a_start_treats_each_state_as_the_table_says(self) -> None:
        eml = MESSAGE
        json_ = etrn.format_sidecar(sidecar_of("ABCDEF", size=len(eml), sha256=hashlib.sha256(eml).hexdigest()))
        file = os.path.join(self.folder, "etrn.conf")
        with open(file, "w", encoding="utf-8") as stream:
            stream.write("[relay]\nlog = relay.log\n[domain %s]\nprimary = 127.0.0.1:9\n" % DOMAIN)
        for state, root, incoming, done, queued, corrupt in cases(self, [
                ("S1", "", "eml", "", 0, ""), ("S2", "", "eml json", "", 0, ""), ("S3", "eml", "json", "", 0, ""),
                ("S4", "eml json", "", "", 1, ""), ("S5", "eml json", "new", "", 1, ""), ("S6", "eml", "", "json", 0, ""),
                ("S7", "", "", "json", 0, ""), ("S8", "eml", "", "", 0, "eml"), ("S9", "json", "", "", 0, "json")]):
            for where, kinds in (("", root), ("incoming", incoming), ("done", done)):
                for kind in kinds.split():
                    self.put(where, "ABCDEF." + kind, json_ if kind == "json" else eml, age_s=7200)
            code, out, _ = run("--config", file, "--queue", "--json")
            self.assertEqual((code, len(json.loads(out))), (0, queued), state)
            tree = self.tree()
            self.assertEqual((tree["incoming"], tree["done"]), ([], []))
            self.assertEqual(tree[""], ["ABCDEF.eml", "ABCDEF.json"] if queued else [])
            self.assertEqual(tree["corrupt"], ["ABCDEF." + kind for kind in corrupt.split()])
            for where, names in tree.items():
                for name in names:
                    os.unlink(os.path.join(self.path, where, name))

    def test_a_young_body_without_sidecar_may_be_half_of_a_pair_being_copied(self) -> None:
        self.put("", "ABCDEF.eml", MESSAGE, age_s=60)
        self.put("", "ABCDE0.eml", MESSAGE, age_s=7200)
        spool = opened(self.path)
        orphans: List[str] = []
        self.assertEqual((list(spool.names(orphans)), orphans), ([], ["ABCDE0"]))
        spool.close()

    def test_files_of_others_are_left_alone(self) -> None:
        for name in ("README", "notes.json", "abc.eml", "A.eml", "ABCDEF.txt"):
            self.put("", name, b"x", age_s=7200)
            self.put("incoming", name, b"x", age_s=7200)
        before = self.tree()
        self.assertEqual(recover(self.path), {})
        self.assertEqual(self.tree(), before)

    def test_sidecars_that_cannot_be_trusted_are_corrupt(self) -> None:
        good = sidecar_of("ABCDEF", size=1, sha256="0" * 64)
        person = good["recipients"][0]
        self.assertEqual(etrn.parse_sidecar(etrn.format_sidecar(good), "ABCDEF"), good)
        for change in cases(self, [
                {"format": 2}, {"format": None}, {"id": "ABCDE0"}, {"received": "x"}, {"size": None}, {"size": -10 ** 12},
                {"sender": 5},
                {"sender": "a@b.example>\r\nRCPT TO:<v@other.example"}, {"sender": "a b"}, {"sha256": None}, {"client": []},
                {"client": {}},
                {"recipients": []}, {"recipients": [5]}, {"recipients": [dict(person, address="a@b@c")]}, {"recipients": {}},
                {"recipients": [dict(person, address="v@other.example")]},
                {"recipients": [dict(person, address="u@%s> X" % DOMAIN)]},
                {"recipients": [dict(person, notify="NEVER\r\nDATA")]}, {"recipients": [dict(person, orcpt="x\n")]},
                {"envid": "a\r\nb"},
                {"recipients": [dict(person, attempts="1")]}, {"ret": 1}, {"held": [1]}, {"kind": None}]):
            self.assertRaises(etrn.Corrupt, etrn.parse_sidecar, json.dumps(dict(good, **change)).encode(), "ABCDEF")
        for data in cases(self, [b"", b"{", b"[]", b"null", b"5", b"\xff", b"[" * 100000, b'{"format": 1}', b"\0" * 100]):
            self.assertRaises(etrn.Corrupt, etrn.parse_sidecar, data, "ABCDEF")

    def test_a_bad_pair_is_set_aside_and_does_not_stop_the_rest(self) -> None:
        spool = opened(self.path)
        for id in ("ABCDE0", "ABCDE1", "ABCDE2"):
            self.assertIsNone(store(spool, id))
        self.put("", "ABCDE1.json", b"{broken")
        self.put("corrupt", "ABCDE1.json", b"an earlier one")
        self.assertRaises(etrn.Corrupt, spool.read_sidecar, "ABCDE1")
        self.assertIn("moved to corrupt/", spool.set_aside("ABCDE1", "broken"))
        self.assertEqual(sorted(spool.names()), ["ABCDE0", "ABCDE2"])
        self.assertEqual(len(self.tree()["corrupt"]), 3)
        spool.close()

    def test_a_body_that_does_not_match_its_sha256_is_not_sent(self) -> None:
        spool = opened(self.path)
        for body, damage in cases(self, [(MESSAGE, lambda data: data[:-1] + b"X"), (MESSAGE, lambda data: data + b"X"),
                                         (MESSAGE, lambda data: data[:-1]), (MESSAGE, lambda data: b""),
                                         (MESSAGE * 9000, lambda data: data[:-1] + b"X")]):
            self.assertIsNone(store(spool, "ABCDEF", body))
            self.put("", "ABCDEF.eml", damage(body))
            self.assertRaises(etrn.Corrupt, spool.read_message, "ABCDEF", spool.read_sidecar("ABCDEF"))
            self.assertEqual(spool.remove(["ABCDEF"]), [None])
        spool.close()

    def test_the_spool_has_one_owner(self) -> None:
        first = opened(self.path)
        with self.assertRaises(etrn.SpoolBusy) as caught:
            etrn.Spool(self.path).open()
        self.assertIn(str(os.getpid()), str(caught.exception))
        first.close()
        opened(self.path).close()

    def test_an_older_state_does_not_replace_a_newer_one(self) -> None:
        """Committers take them in any order."""
        spool = opened(self.path)
        for number, recipients, state, known in cases(self, [
                (1, {"n": 1}, 1, 1), (3, {"n": 3}, 3, 3), (2, {"n": 2}, 3, 3), (4, None, 4, 3), (5, {"n": 5}, 5, 5)]):
            spool.save_state({"n": number}, recipients, number)
            self.assertEqual((spool.load_state(), spool.load_state("recipients.json")), ({"n": state}, {"n": known}))
        spool.close()

    def test_an_unreadable_state_file_costs_only_what_was_learned(self) -> None:
        spool = opened(self.path)
        spool.save_state({"format": 1, "sites": {}})
        self.assertEqual(spool.load_state()["format"], 1)
        for data in cases(self, [b"", b"{", b"[]", b"\xff"]):
            self.put("", "state.json", data)
            self.assertEqual(spool.load_state(), {})
        spool.close()

    def test_files_are_readable_by_their_owner_alone(self) -> None:
        spool = opened(self.path)
        self.assertIsNone(store(spool, "ABCDEF"))
        for name in cases(self, ["ABCDEF.eml", "ABCDEF.json", "lock"]):
            self.assertEqual(os.stat(os.path.join(self.path, name)).st_mode & 0o77, 0)
        spool.close()


class SpoolSaves(SpoolCase):
    def test_an_older_state_never_takes_the_place_of_a_newer_one(self) -> None:
        """Committers finish in any order."""
        spool = opened(os.path.join(self.folder, "saves"))
        self.addCleanup(spool.close)
        for number, recipients in ((2, None), (1, {"from": 1}), (3, None), (2, {"from": 2}), (1, {"from": 1})):
            spool.save_state({"from": number}, recipients, number)
        self.assertEqual((spool.load_state(), spool.load_state("recipients.json")), ({"from": 3}, {"from": 2}))


class SpoolCrashes(SpoolCase):
    def first(self, spool: etrn.Spool) -> None:
        self.assertIsNone(store(spool, "ABCDE0"))

    def test_an_acknowledged_message_survives_a_stop_at_any_operation(self) -> None:
        def act(spool: etrn.Spool) -> Optional[OSError]:
            return store(spool, "ABCDE1")
        for result, found in self.every_stop(act, self.first):
            self.assertEqual(found["ABCDE0"], MESSAGE)
            self.assertIn(found.get("ABCDE1"), [MESSAGE] if result is None else [None, MESSAGE])

    def test_files_used_again_are_as_safe_as_new_ones(self) -> None:
        def before(spool: etrn.Spool) -> None:
            self.first(spool)
            for id in ("ABCDE2", "ABCDE3"):
                store(spool, id, b"Subject: delivered\r\n\r\n" + b"x" * 5000 + b"\r\n")
            self.assertEqual(spool.remove(["ABCDE2", "ABCDE3"]), [None, None])
            self.assertEqual(sorted(os.listdir(spool.done)), sorted(spool.spares))
            self.assertEqual({os.path.getsize(os.path.join(spool.done, name)) for name in spool.spares}, {0})

        def act(spool: etrn.Spool) -> Optional[OSError]:
            made = len(spool.spares)
            try:
                return store(spool, "ABCDE1")
            finally:
                self.assertLessEqual(len(spool.spares), made)
        for result, found in self.every_stop(act, before):
            self.assertEqual(found.pop("ABCDE0"), MESSAGE)
            self.assertIn(found, [{"ABCDE1": MESSAGE}] if result is None else [{}, {"ABCDE1": MESSAGE}])
        spool = opened(self.fresh())
        before(spool)
        inodes = {os.stat(os.path.join(spool.done, name)).st_ino for name in spool.spares}
        act(spool)
        self.assertTrue({os.stat(os.path.join(spool.path, name)).st_ino for name in spool_files(spool.path)} & inodes)
        spool.close()

    def test_no_more_finished_files_are_kept_than_are_of_use(self) -> None:
        spool = opened(self.fresh())
        for number in range(6):
            store(spool, "ABCDE%d" % number)
        with shorten(SPARES_MAX=5):
            spool.remove(["ABCDE%d" % number for number in range(6)])
        self.assertEqual((len(os.listdir(spool.done)), len(spool.spares), spool_files(spool.path)), (5, 5, []))
        spool.close()
        opened(spool.path).close()
        self.assertEqual(os.listdir(spool.done), [])

    def test_a_batch_is_as_safe_as_one_message(self) -> None:
        def act(spool: etrn.Spool) -> List[Optional[OSError]]:
            ids = ("ABCDE1", "ABCDE2", "ABCDE3")
            return spool.commit([(etrn.Draft(id), [MESSAGE, id.encode()], sidecar_of(id)) for id in ids])
        for result, found in self.every_stop(act, self.first):
            self.assertEqual(found.pop("ABCDE0"), MESSAGE)
            if result is not Stopped:
                self.assertEqual((result, sorted(found)), ([None] * 3, ["ABCDE1", "ABCDE2", "ABCDE3"]))
            for id, body in found.items():
                self.assertEqual(body, MESSAGE + id.encode())

    def test_a_sidecar_is_the_old_or_the_new_one(self) -> None:
        def act(spool: etrn.Spool) -> Any:
            return spool.update("ABCDE0", lambda sidecar: sidecar.update(held=[DOMAIN]))
        for _, found in self.every_stop(act, self.first):
            self.assertEqual(found, {"ABCDE0": MESSAGE})

    def test_a_removal_leaves_a_whole_message_or_none(self) -> None:
        def act(spool: etrn.Spool) -> Any:
            return spool.remove(["ABCDE0"])
        for result, found in self.every_stop(act, self.first):
            self.assertIn(found, [{}] if result == [None] else [{}, {"ABCDE0": MESSAGE}])

    def test_a_notice_is_safe_before_its_message_leaves(self) -> None:
        now = time.time()
        verdict = etrn.Verdict("user@" + DOMAIN, etrn.BOUNCED, "5.1.1", "550 5.1.1 no", "mail.example")

        def act(spool: etrn.Spool) -> Any:
            etrn.write_record(spool, "ABCDE0", etrn.Record(lambda one: verdict, 1, now, now), config(), etrn.Ids())
            return spool.remove(["ABCDE0"])
        for result, found in self.every_stop(act, self.first):
            notices = [body for id, body in found.items() if id != "ABCDE0"]
            self.assertTrue("ABCDE0" in found or notices)
            self.assertTrue(all(b"multipart/report" in body for body in notices))
            if result == [None]:
                self.assertEqual((len(found), len(notices)), (1, 1))

    def test_a_start_that_is_stopped_leaves_the_queue_as_it_was(self) -> None:
        def before(spool: etrn.Spool) -> None:
            self.first(spool)
            for where, name in (("incoming", "ABCDE1.eml"), ("incoming", "ABCDE2.json"), ("", "ABCDE2.eml"),
                                ("done", "ABCDE3.json"),
                                ("", "ABCDE3.eml"), ("incoming", "ABCDE0.new")):
                with open(os.path.join(spool.path, where, name), "wb") as file:
                    file.write(MESSAGE)
        for _, found in self.every_stop(lambda spool: spool.sweep(), before):
            self.assertEqual(found, {"ABCDE0": MESSAGE})


class SpoolFaults(SpoolCase):
    ERRORS = (errno.EIO, errno.ENOSPC, errno.EMFILE, errno.EROFS, errno.EDQUOT)

    def nothing(self, spool: etrn.Spool) -> None:
        """The spool as it comes."""

    def test_every_failing_operation_refuses_the_message_and_leaves_nothing(self) -> None:
        def act(spool: etrn.Spool) -> Optional[OSError]:
            return store(spool, "ABCDE1")
        count = self.operations(act, self.nothing)
        refused = 0
        for at, fault in cases(self, itertools.product(range(count), self.ERRORS)):
            disk, result = self.attempt(act, self.nothing, at=at, fault=fault)
            if disk.is_harmless:
                self.assertIsNone(result)
                continue
            self.assertIsInstance(result, OSError)
            self.assertEqual(result.errno, fault)
            refused += 1
            self.assertEqual((os.listdir(os.path.join(disk.folder, "incoming")), spool_files(disk.folder), self.left_open),
                             ([], [], 0))
            self.assertEqual(etrn.disk_reply(result).code, 452 if fault in (errno.ENOSPC, errno.EDQUOT) else 451)
        self.assertGreater(refused, 30)

    def test_a_disk_that_fails_for_good_acknowledges_nothing(self) -> None:
        def act(spool: etrn.Spool) -> Optional[OSError]:
            return store(spool, "ABCDE1")
        count = self.operations(act, self.nothing)
        for at, fault in cases(self, itertools.product(range(count), self.ERRORS)):
            disk, result = self.attempt(act, self.nothing, at=at, fault=fault, forever=True)
            self.assertTrue(isinstance(result, OSError) or (disk.is_harmless and at == count - 1))
            self.assertIn(recover(disk.folder), [{}, {"ABCDE1": MESSAGE}])

    def test_a_failing_operation_costs_no_other_message_of_its_batch_its_safety(self) -> None:
        ids = ("ABCDE1", "ABCDE2", "ABCDE3")

        def act(spool: etrn.Spool) -> List[Optional[OSError]]:
            return spool.commit([(etrn.Draft(id), [MESSAGE], sidecar_of(id)) for id in ids])
        partly = 0
        for at in cases(self, range(self.operations(act, self.nothing))):
            disk, results = self.attempt(act, self.nothing, at=at, fault=errno.EIO)
            partly += None in results
            kept = {id: MESSAGE for id, result in zip(ids, results) if result is None}
            self.assertEqual(recover(disk.power_cut(self.fresh())), kept)
            self.assertEqual(recover(disk.folder), kept)
        self.assertGreater(partly, 5)

    def test_a_failed_fsync_is_not_tried_again_on_the_same_file(self) -> None:
        synced: List[int] = []

        def failing(fd: int) -> None:
            synced.append(os.fstat(fd).st_ino)
            raise OSError(errno.EIO, "I/O error")
        spool = opened(self.path)
        with mock.patch.object(etrn.os, "fsync", failing):
            for number in range(3):
                self.assertEqual(store(spool, "ABCDE%d" % number).errno, errno.EIO)
        self.assertEqual(len(synced), 3)
        spool.close()

    def test_failing_changes_leave_the_old_sidecar(self) -> None:
        def before(spool: etrn.Spool) -> None:
            self.assertIsNone(store(spool, "ABCDE0"))

        def act(spool: etrn.Spool) -> Any:
            try:
                return spool.update("ABCDE0", lambda sidecar: sidecar.update(held=[DOMAIN]))
            except OSError as error:
                return error
        for at in cases(self, range(self.operations(act, before))):
            disk, result = self.attempt(act, before, at=at, fault=errno.EIO)
            self.assertTrue(isinstance(result, OSError) or disk.is_harmless)
            self.assertEqual((recover(disk.folder), self.left_open), ({"ABCDE0": MESSAGE}, 0))

    def test_a_failing_removal_is_told_or_done(self) -> None:
        def before(spool: etrn.Spool) -> None:
            self.assertIsNone(store(spool, "ABCDE0"))

        def act(spool: etrn.Spool) -> Any:
            return spool.remove(["ABCDE0"])[0]
        for at in cases(self, range(self.operations(act, before))):
            disk, result = self.attempt(act, before, at=at, fault=errno.EIO)
            found = recover(disk.folder)
            self.assertTrue(found == {} or isinstance(result, OSError), found)

    def test_short_writes_are_no_errors(self) -> None:
        spool = opened(self.path)
        real = os.write
        with mock.patch.object(etrn.os, "write", lambda fd, data: real(fd, bytes(data)[:7])):
            self.assertIsNone(store(spool, "ABCDE1"))
        spool.close()
        self.assertEqual(recover(self.path), {"ABCDE1": MESSAGE})

    def test_a_sick_spool_heals_when_a_probe_file_survives(self) -> None:
        spool = opened(self.path)
        with mock.patch.object(etrn.os, "fsync", side_effect=OSError(errno.EIO, "I/O error")):
            self.assertIsNotNone(store(spool, "ABCDE1"))
            self.assertTrue(spool.sick)
            self.assertFalse(spool.heal())
        self.assertTrue(spool.heal())
        self.assertEqual((spool.sick, spool_files(self.path), os.listdir(spool.incoming)), ("", [], []))
        spool.close()

    def test_a_full_disk_is_not_sick(self) -> None:
        spool = opened(self.path)
        with mock.patch.object(etrn.os, "fsync", side_effect=OSError(errno.ENOSPC, "full")):
            self.assertIsNotNone(store(spool, "ABCDE1"))
        self.assertEqual(spool.sick, "")
        spool.close()


class Found:
    """What scandir() yields."""

    def __init__(self, name: str, stat_: Any) -> None:
        self.name, self.stat = name, lambda: stat_


class Node:
    """A file or folder of a Platter: what it is now, and what of that a power cut would leave at least."""

    def __init__(self, is_folder: bool = False) -> None:
        self.is_folder = is_folder
        self.data = b""                         # of a file
        self.safe = b""
        self.names: Dict[str, "Node"] = {}      # of a folder
        self.safe_names: Dict[str, "Node"] = {}
        self.pending: Dict[str, List[Optional["Node"]]] = {}    # name: what it has meant since the last fsync

    def set(self, name: str, node: Optional["Node"]) -> None:
        self.pending.setdefault(name, []).append(node)
        if node is None:
            del self.names[name]
        else:
            self.names[name] = node

    def sync(self) -> None:
        self.safe, self.safe_names = self.data, dict(self.names)
        self.pending.clear()


Remains = Dict[str, Optional[bytes]]      # what a power cut leaves: path: octets, or None for a folder


class Platter:
    """A file system in memory that stands for the module `os` within
    etrn_relay, and keeps after a power cut only what POSIX says: the
    octets a file had at its fsync, and the names a folder had at its own.  Of
    all that is not synced any part may have reached the disk, in any
    order: the two halves of a rename each for itself, an octet string torn or
    as zeros.  Only that a name means one file or the other is certain, and that an
    unsynced rename does not lose the file: its old name goes after the new one is there.

    `on_step` is called before each operation that changes something; `fault`
    gives the errno with which the nth operation fails, or 0; `most` octets go into one write."""

    def __init__(self, state: Optional[Remains] = None, age_s: float = 0.0) -> None:
        self.root = Node(True)
        self.files: Dict[int, Tuple[Node, int]] = {}    # descriptor: (node, where reading goes on)
        self.renames: List[Tuple[Node, str, Node, Node, str]] = []      # (folder, name, file, new folder, new name)
        self.count = 0
        self.syncs = 0
        self.time = time.time() - age_s
        self.on_step: Callable[[], None] = lambda: None
        self.fault: Callable[[int, str], int] = lambda number, name: 0
        self.most = 1 << 30
        self.path = self                # os.path, as far as it looks at files
        for path, data in sorted((state or {}).items()):
            node = Node(data is None)
            node.data = node.safe = data or b""
            folder, name = self._parent(path)
            folder.names[name] = folder.safe_names[name] = node

    def __getattr__(self, name: str) -> Any:
        if name in ("join", "dirname", "basename", "abspath"):
            return getattr(os.path, name)
        if name.startswith(("O_", "SEEK_")) or name in ("getpid", "geteuid"):
            return getattr(os, name)
        raise AttributeError("the disk's model knows no os." + name)

    # -- what stands for os

    def _parent(self, path: str) -> Tuple[Node, str]:
        folder, name = os.path.split(path)
        node = self.root
        for part in folder.strip("/").split("/") if folder.strip("/") else []:
            if part not in node.names or not node.names[part].is_folder:
                raise OSError(errno.ENOENT, "No such file or directory", path)
            node = node.names[part]
        return node, name

    def _find(self, path: str) -> Node:
        folder, name = self._parent(path.rstrip("/"))
        if not name:
            return self.root
        if name not in folder.names:
            raise OSError(errno.ENOENT, "No such file or directory", path)
        return folder.names[name]

    def _step(self, name: str) -> None:
        self.on_step()
        number, self.count = self.count, self.count + 1
        code = self.fault(number, name)
        if code:
            raise OSError(code, os.strerror(code))

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        self._step("open")
        folder, name = self._parent(path)
        if flags & os.O_CREAT and name not in folder.names:
            folder.set(name, Node())
        elif flags & os.O_EXCL:
            raise OSError(errno.EEXIST, "File exists", path)
        elif flags & os.O_TRUNC:
            self._find(path).data = b""
        fd = max(self.files, default=99) + 1
        self.files[fd] = (self._find(path), 0)
        return fd

    def read(self, fd: int, most: int) -> bytes:
        node, at = self.files[fd]
        data = node.data[at:at + most]
        self.files[fd] = (node, at + len(data))
        return data

    def lseek(self, fd: int, at: int, how: int) -> None:
        self.files[fd] = (self.files[fd][0], at)

    def write(self, fd: int, data: Any) -> int:
        self._step("write")
        part = bytes(data)[:self.most]
        self.files[fd][0].data += part
        return len(part)

    def truncate(self, path: str, size: int) -> None:
        self._step("truncate")
        node = self._find(path)
        node.data = node.data[:size]

    def ftruncate(self, fd: int, size: int) -> None:
        self._step("ftruncate")
        self.files[fd][0].data = self.files[fd][0].data[:size]

    def fsync(self, fd: int) -> None:
        self._step("fsync")
        self.syncs += 1
        self.files[fd][0].sync()

    def close(self, fd: int) -> None:
        node, _ = self.files.pop(fd)    # gone, even when this fails
        if not node.is_folder:
            self._step("close")

    def rename(self, old: str, new: str) -> None:
        self._step("rename")
        node = self._find(old)
        here, name = self._parent(old)
        there, new_name = self._parent(new)
        there.set(new_name, node)
        here.set(name, None)
        self.renames.append((here, name, node, there, new_name))

    def unlink(self, path: str) -> None:
        self._step("unlink")
        self._find(path)
        folder, name = self._parent(path)
        folder.set(name, None)

    def makedirs(self, path: str, mode: int = 0o777, exist_ok: bool = False) -> None:
        parts = path.strip("/").split("/")
        for depth in range(1, len(parts) + 1):
            folder, name = self._parent("/" + "/".join(parts[:depth]))
            if name not in folder.names:
                self._step("mkdir")
                folder.set(name, Node(True))

    def listdir(self, path: str) -> List[str]:
        return list(self._find(path).names)

    @contextlib.contextmanager
    def scandir(self, path: str) -> Iterator[Iterable[Any]]:
        yield [Found(name, self._stat(node)) for name, node in self._find(path).names.items()]

    def _stat(self, node: Node) -> Any:
        return argparse.Namespace(st_mode=(stat.S_IFDIR if node.is_folder else stat.S_IFREG) | 0o600,
                                  st_size=len(node.data),
                                  st_dev=1, st_ino=id(node), st_nlink=1, st_uid=os.geteuid(),
                                  st_mtime=self.time, st_ctime=self.time)

    def stat(self, path: str) -> Any:
        return self._stat(self._find(path))

    lstat = stat

    def fstat(self, fd: int) -> Any:
        return self._stat(self.files[fd][0])

    def lexists(self, path: str) -> bool:
        try:
            return self._find(path) is not None
        except OSError:
            return False

    def realpath(self, path: str) -> str:
        return path

    # -- power cuts

    def states(self, chance: random.Random, most: int) -> Iterator[Remains]:
        """What a power cut may leave now: all of it when that is not more than
        `most`, else the plain ones, each single exception to these, and some by chance."""
        choices: List[Tuple[Node, Optional[str]]] = []      # a name of a folder, or None for the octets of a file ...
        options: List[List[Any]] = []                       # ... and what it may be, the synced one first
        for node in self._reachable():
            for name, values in node.pending.items():
                choices.append((node, name))
                options.append(list(dict.fromkeys([node.safe_names.get(name), *values])))
            if node.data != node.safe:
                new = node.data
                choices.append((node, None))
                options.append(list(dict.fromkeys([node.safe, new[:len(new) // 2], b"\0" * len(new), new])))
        total = 1
        for one in options:
            total *= len(one)
        if total <= most:
            picks: Iterable[Tuple[int, ...]] = itertools.product(*(range(len(one)) for one in options))
        else:
            picks = self._some(options, chance, most)
        for pick in picks:
            chosen = {choice: values[number] for choice, values, number in zip(choices, options, pick)}
            for here, name, node, there, new_name in self.renames:
                if name in here.pending and chosen[here, name] is None:
                    if chosen.get((there, new_name), there.safe_names.get(new_name)) is not node:
                        chosen[here, name] = node
            yield self._state(chosen)

    @staticmethod
    def _some(options: List[List[Any]], chance: random.Random, most: int) -> Iterator[Tuple[int, ...]]:
        for plain in ([0] * len(options), [len(one) - 1 for one in options]):
            yield tuple(plain)
            for at, values in enumerate(options):
                for number in range(len(values)):
                    yield tuple(plain[:at] + [number] + plain[at + 1:])
        for _ in range(most):
            yield tuple(chance.randrange(len(values)) for values in options)

    def killed(self) -> Remains:
        """What there is when the process dies, and the machine does not."""
        return self._state({**{(node, name): values[-1] for node in self._reachable() for name, values in node.pending.items()},
                            **{(node, None): node.data for node in self._reachable()}})

    def now(self) -> Remains:
        """What an orderly end leaves."""
        for node in self._reachable():
            node.sync()
        return self._state({})

    def _reachable(self) -> List[Node]:
        found: List[Node] = []
        left = [self.root]
        while left:
            node = left.pop()
            if all(node is not other for other in found):
                found.append(node)
                left += [*node.names.values(), *node.safe_names.values()]
                left += [one for values in node.pending.values() for one in values if one is not None]
        return found

    def _state(self, chosen: Dict[Any, Any]) -> Remains:
        state: Remains = {}

        def walk(folder: Node, path: str) -> None:
            for name in {**folder.safe_names, **folder.pending}:
                node = chosen.get((folder, name), folder.safe_names.get(name))
                if node is not None:
                    state[path + name] = None if node.is_folder else chosen.get((node, None), node.safe)
                    if node.is_folder:
                        walk(node, path + name + "/")
        walk(self.root, "/")
        return state


class Promised:
    """What was promised of messages, at one moment."""

    def __init__(self) -> None:
        self.kept: Dict[str, bytes] = {}        # answered 250: there, intact
        self.offered: Dict[str, bytes] = {}     # not answered: there, intact; or not in the queue
        self.leaving: Dict[str, bytes] = {}     # delivered: there, intact; or gone whole
        self.files: Dict[str, bytes] = {}       # never to be deleted: in the queue or in corrupt/
        self.untold: List[str] = []             # bounced: there and queued; or a notice of it is
        self.states: Dict[str, List[Dict[str, str]]] = {}       # id: what its recipients' states may be
        self.held: Dict[str, List[List[str]]] = {}

    def keep(self, id: str) -> None:
        self.kept[id] = self.offered.pop(id)

    def copy(self) -> "Promised":
        return copy.deepcopy(self)


class PowerCuts(unittest.TestCase):
    """Whatever part of what was not synced a power cut leaves, the promise holds.
    No real disk: every moment of every story is cut, in each way there is."""

    SPOOL = "/var/spool/etrn"
    OTHER = "other@" + DOMAIN
    USER = "user@" + DOMAIN

    def setUp(self) -> None:
        self.chance = random.Random(6)
        platter = Platter({"/var": None, "/var/spool": None})
        with self.on(platter):
            spool = self.opened()
            self.assertIsNone(store(spool, "ABCDE0", recipients=[self.USER, self.OTHER]))
            self.assertIsNone(store(spool, "ABCDE1"))
        self.two = platter.now()                # a spool with two messages

    @contextlib.contextmanager
    def on(self, platter: Platter) -> Iterator[None]:
        lock = argparse.Namespace(LOCK_EX=2, LOCK_NB=4, flock=lambda fd, how: None)
        with mock.patch.object(etrn, "os", platter), mock.patch.object(etrn, "fcntl", lock):
            yield

    def opened(self) -> etrn.Spool:
        return opened(self.SPOOL)

    def cut(self, act: Callable[[etrn.Spool, Promised], Any], remains: Optional[Remains] = None, most: int = 48) -> Platter:
        """Cut the power before and after each step of `act`, on a spool of two messages unless told otherwise."""
        platter = Platter(self.two if remains is None else remains)
        promised = Promised()
        if remains is None:
            promised.kept = {"ABCDE0": MESSAGE, "ABCDE1": MESSAGE}
        found: Dict[Any, Tuple[Remains, Promised, bool]] = {}

        def look() -> None:
            now = promised.copy()
            for state, is_killed in itertools.chain([(platter.killed(), True)],
                                                    ((one, False) for one in platter.states(self.chance, most))):
                found.setdefault((frozenset(state.items()), repr(vars(now)), is_killed), (state, now, is_killed))
        with self.on(platter):
            spool = etrn.Spool(self.SPOOL)
            if remains is None:
                spool.open()
            platter.on_step = look
            act(spool, promised)
            look()
        for state, then, is_killed in found.values():
            self.check(state, then, is_killed)
        self.assertGreater(len(found), 4)
        return platter

    def check(self, state: Remains, promised: Promised, is_killed: bool = False) -> None:
        """Start after the cut, and compare.  After a mere kill no half of a pair is there to explain."""
        self.state = {path: data and data[:60] for path, data in state.items()}, vars(promised)
        for name, data in promised.files.items():
            self.assertIn(data, [state.get("%s/%s" % (self.SPOOL, name)), state.get("%s/corrupt/%s" % (self.SPOOL, name))])
        platter = Platter(state, 2 * etrn.ORPHAN_S)
        orphans: List[str] = []
        with self.on(platter):
            spool = self.opened()
            sidecars, bodies, torn = {}, {}, set()
            for id in list(spool.names(orphans)):
                try:
                    sidecars[id] = spool.read_sidecar(id)
                    message = spool.read_message(id, sidecars[id])
                    bodies[id] = b"".join(message.blocks())
                    message.close()
                except etrn.Corrupt:
                    torn.add(id)
            spool.close()
        self.assertEqual(platter.files, {})
        self.assertEqual({id for id in torn if is_killed or id in promised.kept or id in promised.leaving}
                         - {name[:-5] for name in promised.files}, set())
        if is_killed and not promised.files:
            self.assertEqual(orphans, [])
        told = {id for id, sidecar in sidecars.items() if id in bodies and sidecar["kind"] == "notice"}
        for id, body in promised.kept.items():
            self.assertEqual(bodies.get(id), body, id)
        for id in set(bodies) - told:
            self.assertEqual(bodies[id], {**promised.leaving, **promised.offered, **promised.kept}.get(id), id)
            states = {one["address"]: one["state"] for one in sidecars[id]["recipients"]}
            self.assertIn(states, promised.states.get(id, [states]))
            self.assertIn(sidecars[id]["held"], promised.held.get(id, [[]]))
        for id in promised.untold:
            self.assertTrue(id in bodies or any(id.encode() in bodies[one] for one in told), "nobody tells of " + id)

    def accept(self, spool: etrn.Spool, promised: Promised, id: str) -> None:
        promised.offered[id] = MESSAGE
        if store(spool, id) is None:
            promised.keep(id)

    def test_the_first_message_of_a_new_spool(self) -> None:
        def act(spool: etrn.Spool, promised: Promised) -> None:
            spool.open()
            self.accept(spool, promised, "ABCDE5")
            self.accept(spool, promised, "ABCDE6")
        self.cut(act, {"/var": None, "/var/spool": None})

    def test_a_batch_with_a_body_that_came_in_parts(self) -> None:
        def act(spool: etrn.Spool, promised: Promised) -> None:
            batch = []
            for id in ("ABCDE5", "ABCDE6", "ABCDE7"):
                promised.offered[id] = b"one\r\ntwo\r\n" + id.encode()
                draft = etrn.Draft(id, b"one\r\n")
                if id != "ABCDE5":
                    spool.append(draft, draft.take())
                batch.append((draft, [*draft.take(), b"two\r\n", id.encode()], sidecar_of(id)))
            self.assertEqual(spool.commit(batch), [None] * 3)
            for id in list(promised.offered):
                promised.keep(id)
        self.cut(act, most=16)

    def test_a_message_whose_names_cannot_be_synced(self) -> None:
        def act(spool: etrn.Spool, promised: Promised) -> None:
            platter = etrn.os
            names = [0]

            def fault(number: int, name: str) -> int:
                names[0] += name == "rename"
                return errno.EIO if name == "fsync" and names[0] == 2 else 0
            platter.fault = fault               # type: ignore[attr-defined]
            self.accept(spool, promised, "ABCDE5")
            self.assertIn("ABCDE5", promised.offered)
            self.assertEqual(list(spool.names()), ["ABCDE0", "ABCDE1"])
        self.cut(act)

    def test_a_message_that_cannot_be_withdrawn_stays_whole(self) -> None:
        platter, failing = Platter(self.two), iter(["fsync", "rename", "unlink"])
        with self.on(platter):
            spool = self.opened()
            renames, nexts = [0], [next(failing)]

            def fault(number: int, name: str) -> int:
                renames[0] += name == "rename"
                if renames[0] < 2 or name != nexts[0]:
                    return 0
                nexts[0] = next(failing, "")
                return errno.EIO
            platter.fault = fault               # type: ignore[method-assign]
            self.assertIsInstance(store(spool, "ABCDE5"), OSError)
            self.assertEqual(nexts, [""])
            self.assertEqual(recover_open(spool), {"ABCDE0": MESSAGE, "ABCDE1": MESSAGE, "ABCDE5": MESSAGE})

    def test_a_client_that_left(self) -> None:
        def act(spool: etrn.Spool, promised: Promised) -> None:
            draft = etrn.Draft("ABCDE5")
            spool.append(draft, [b"one\r\n"])
            spool.discard(draft)
        self.cut(act)

    def test_a_change_of_the_sidecar(self) -> None:
        def act(spool: etrn.Spool, promised: Promised) -> None:
            for before, after in (([], ["a.example"]), (["a.example"], ["b.example"])):
                promised.held["ABCDE0"] = [before, after]
                spool.update("ABCDE0", lambda sidecar, after=after: sidecar.update(held=after))
                promised.held["ABCDE0"] = [after]
        self.cut(act)

    def test_the_state_of_the_primaries(self) -> None:
        def act(spool: etrn.Spool, promised: Promised) -> None:
            spool.save_state({"format": 1}, {"format": 1})
        platter = self.cut(act)
        for state in platter.states(self.chance, 48):
            self.assertEqual(json.loads(state[self.SPOOL + "/state.json"] or b""), {"format": 1})

    def test_a_delivery_to_some_of_its_recipients(self) -> None:
        queued = {self.USER: etrn.QUEUED, self.OTHER: etrn.QUEUED}
        partly = {self.USER: etrn.DELIVERED, self.OTHER: etrn.QUEUED}

        def act(spool: etrn.Spool, promised: Promised) -> None:
            promised.states["ABCDE0"] = [queued, partly]
            self.record(spool, "ABCDE0", self.USER, etrn.DELIVERED)
            promised.states["ABCDE0"] = [partly]
        self.cut(act)

    def record(self, spool: etrn.Spool, id: str, address: str, state: str) -> etrn.Recorded:
        verdict = etrn.Verdict(address, state, "5.1.1", "550 5.1.1 no", "mail.example")
        judge = lambda one: verdict if one["address"] == address else None      # noqa: E731
        return etrn.write_record(spool, id, etrn.Record(judge, 1, time.time(), time.time()), config(), etrn.Ids())

    def test_a_delivery_to_all_recipients(self) -> None:
        def act(spool: etrn.Spool, promised: Promised) -> None:
            ids = ["ABCDE0", "ABCDE1"]
            for id in ids:
                promised.leaving[id] = promised.kept.pop(id)
            self.assertEqual(spool.remove(ids), [None, None])
            promised.leaving.clear()
        platter = self.cut(act)
        left = platter.listdir(self.SPOOL + "/incoming") + platter.listdir(self.SPOOL)
        self.assertEqual([name for name in left if "ABC" in name], [])
        self.assertEqual({node.data for node in platter._find(self.SPOOL + "/done").names.values()}, {b""})

    def test_messages_in_files_that_are_used_again(self) -> None:
        def act(spool: etrn.Spool, promised: Promised) -> None:
            ids = ["ABCDE0", "ABCDE1"]
            for id in ids:
                promised.leaving[id] = promised.kept.pop(id)
            self.assertEqual(spool.remove(ids), [None, None])
            promised.leaving.clear()
            self.assertEqual(len(spool.spares), 4)
            for id in ("ABCDE5", "ABCDE6", "ABCDE7"):
                self.accept(spool, promised, id)
            self.assertEqual(len(spool.spares), 0)
        self.cut(act)

    def test_a_message_that_bounces(self) -> None:
        def act(spool: etrn.Spool, promised: Promised) -> None:
            promised.untold.append("ABCDE1")
            promised.leaving["ABCDE1"] = promised.kept.pop("ABCDE1")
            self.assertTrue(self.record(spool, "ABCDE1", self.USER, etrn.BOUNCED).is_finished)
            self.assertEqual(spool.remove(["ABCDE1"]), [None])
            del promised.leaving["ABCDE1"]
        self.cut(act)

    def test_a_message_that_bounces_for_one_recipient(self) -> None:
        def act(spool: etrn.Spool, promised: Promised) -> None:
            promised.states["ABCDE0"] = [{self.USER: one, self.OTHER: etrn.QUEUED} for one in (etrn.QUEUED, etrn.BOUNCED)]
            notices = self.record(spool, "ABCDE0", self.USER, etrn.BOUNCED).notices
            promised.states["ABCDE0"] = [{self.USER: etrn.BOUNCED, self.OTHER: etrn.QUEUED}]
            self.assertEqual(len(notices), 1)
            promised.untold.append("ABCDE0")
        platter = self.cut(act)
        # In no state is the recipient marked and the notice missing.
        self.assertEqual(sum(name.endswith(".eml") for name in platter._find(self.SPOOL).names), 3)

    def test_a_recipient_is_marked_only_when_the_notice_is_safe(self) -> None:
        marked = 0
        seen: List[Remains] = []

        def look() -> None:
            seen.extend(platter.states(self.chance, 48))
        platter = Platter(self.two)
        with self.on(platter):
            spool = self.opened()
            platter.on_step = look
            self.record(spool, "ABCDE0", self.USER, etrn.BOUNCED)
            look()
        for state in cases(self, seen):
            sidecar = state[self.SPOOL + "/ABCDE0.json"]
            assert sidecar is not None
            if etrn.BOUNCED.encode() in sidecar:
                marked += 1
                notice, = [name for name in state if name.startswith(self.SPOOL) and name.endswith(".eml")
                           and "ABCDE" not in name and "/incoming/" not in name]
                self.assertIn(b"multipart/report", state[notice] or b"")
                self.assertIn(notice[:-4] + ".json", state)
        self.assertGreater(marked, 2)

    def test_a_corrupt_pair_is_never_deleted(self) -> None:
        broken = dict(self.two, **{self.SPOOL + "/ABCDE0.json": b"{"})

        def act(spool: etrn.Spool, promised: Promised) -> None:
            promised.files = {"ABCDE0.json": b"{", "ABCDE0.eml": MESSAGE}
            promised.kept["ABCDE1"] = MESSAGE
            spool.open()
            self.assertIn("moved to corrupt/", spool.set_aside("ABCDE0", "broken"))
        platter = self.cut(act, broken)
        self.assertEqual(sorted(platter._find(self.SPOOL + "/corrupt").names), ["ABCDE0.eml", "ABCDE0.json"])
        for state in platter.states(self.chance, 48):       # durable, once it is told
            self.assertEqual(state.get(self.SPOOL + "/corrupt/ABCDE0.eml"), MESSAGE)
            self.assertNotIn(self.SPOOL + "/ABCDE0.eml", state)

    def test_a_start_over_all_the_states_a_crash_leaves(self) -> None:
        remains = dict(self.two)
        for name in ("incoming/ABCDE5.eml", "incoming/ABCDE6.eml", "incoming/ABCDE6.json", "ABCDE7.eml", "incoming/ABCDE7.json",
                     "incoming/ABCDE0.new", "ABCDE8.eml", "done/ABCDE8.json", "done/ABCDE9.json", "done/ABCDE1.json"):
            remains["%s/%s" % (self.SPOOL, name)] = b"left"

        def act(spool: etrn.Spool, promised: Promised) -> None:
            promised.kept = {"ABCDE0": MESSAGE, "ABCDE1": MESSAGE}
            spool.open()
        platter = self.cut(act, remains)
        self.assertEqual([platter.listdir("%s/%s" % (self.SPOOL, one)) for one in ("incoming", "done")], [[], []])
        for state in platter.states(self.chance, 48):       # and what it did to the queue stays so
            self.assertEqual({name for name in state if name.startswith(self.SPOOL + "/ABCDE")},
                             {"%s/ABCDE%d.%s" % (self.SPOOL, number, kind) for number in (0, 1) for kind in ("eml", "json")})

    def test_a_probe_of_a_sick_spool_endangers_nothing(self) -> None:
        def act(spool: etrn.Spool, promised: Promised) -> None:
            spool.sick = "EIO"
            self.assertTrue(spool.heal())
        self.cut(act)

    def test_a_probe_asks_for_all_that_a_message_needs(self) -> None:
        """With any one step of it failing the spool stays sick."""
        platter = Platter(self.two)
        with self.on(platter):
            spool = self.opened()
            spool.sick, first, synced = "EIO", platter.count, platter.syncs
            self.assertTrue(spool.heal())
            self.assertEqual(platter.syncs - synced, 3)         # the file, its name, and its name's end
            steps = platter.count - first
            for at in cases(self, range(steps)):
                spool.sick, first = "EIO", platter.count
                platter.fault = lambda number, name, at=first + at: errno.EIO if number == at else 0    # type: ignore[misc]
                spool.heal()
                self.assertEqual(spool.sick, "EIO" if platter.count > first + at else "")
        self.assertGreater(steps, 5)

    # -- failing calls

    ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE)
    STORIES: Dict[str, Callable[["PowerCuts", etrn.Spool], Any]] = {
        "accept": lambda self, spool: store(spool, "ABCDE5"),
        "hold": lambda self, spool: spool.update("ABCDE0", lambda sidecar: sidecar.update(held=["a.example"])),
        "record": lambda self, spool: self.record(spool, "ABCDE0", self.USER, etrn.DELIVERED),
        "notice": lambda self, spool: self.record(spool, "ABCDE1", self.USER, etrn.BOUNCED),
        "remove": lambda self, spool: spool.remove(["ABCDE1"])[0],
        "again": lambda self, spool: (spool.remove(["ABCDE1"])[0], store(spool, "ABCDE5"))[1],
        "state": lambda self, spool: spool.save_state({"format": 1}),
        "aside": lambda self, spool: spool.set_aside("ABCDE1", "why"),
        "heal": lambda self, spool: spool.heal() or OSError(0, "not healed"),
    }

    def test_a_failing_call_costs_nothing_but_its_own_story(self) -> None:
        self.fail_each([*itertools.product(["accept"], self.ERRORS, (False, True)),
                        *((name, errno.EIO, False) for name in self.STORIES), ("remove", errno.ENOSPC, True)])

    @long_run
    def test_every_call_failing_in_every_way_costs_nothing_but_its_own_story(self) -> None:
        self.fail_each(itertools.product(self.STORIES, self.ERRORS, (False, True)))

    def fail_each(self, rows: Iterable[Tuple[str, int, bool]]) -> None:
        """For each story, errno, and whether it lasts: fail at the first step, at the second, and so on."""
        failed = 0
        for name, fault, lasting in cases(self, rows):
            for at in itertools.count():
                platter = Platter(self.two)
                with self.on(platter):
                    spool = self.opened()
                    first = platter.count
                    platter.fault = (lambda number, _, at=first + at, fault=fault, lasting=lasting:     # type: ignore[misc]
                                     fault if number == at or (lasting and number > at) else 0)
                    try:
                        result = self.STORIES[name](self, spool)
                    except OSError as error:
                        result = error
                    if platter.count <= first + at:
                        break                   # the story has no such step
                    failed += isinstance(result, OSError)
                    if isinstance(result, OSError) and fault in (errno.EIO, errno.EROFS) and name == "accept":
                        self.assertTrue(spool.sick)
                    platter.fault = lambda number, name: 0
                    self.assertTrue(spool.heal())               # well again, and good for another
                    self.assertEqual(spool.sick, "")
                    self.assertIsNone(store(spool, "ABCDE6"))
                    self.assertEqual(spool.entering, set())
                    self.assertLessEqual(len(platter.files), 3)     # the lock, the directory, and none of a failed story
                promised = Promised()
                promised.kept = {"ABCDE0": MESSAGE, "ABCDE1": MESSAGE, "ABCDE6": MESSAGE}
                if name in ("remove", "aside", "notice", "again"):
                    promised.leaving["ABCDE1"] = promised.kept.pop("ABCDE1")
                if name == "notice":
                    promised.untold.append("ABCDE1")
                if name == "hold":
                    promised.held["ABCDE0"] = [[], ["a.example"]]
                if name in ("accept", "again"):
                    (promised.kept if result is None else promised.offered)["ABCDE5"] = MESSAGE
                if fault in (errno.EIO, errno.ENOSPC):
                    for state in platter.states(self.chance, 1):
                        self.check(state, promised)
                if name == "aside":
                    promised.files["ABCDE1.eml"] = MESSAGE
                self.check(platter.now(), promised)
        self.assertGreater(failed, 100)

    def test_short_writes_are_no_errors(self) -> None:
        for name in cases(self, ["accept", "record", "notice"]):
            platter = Platter(self.two)
            platter.most = 7
            with self.on(platter):
                result = self.STORIES[name](self, self.opened())
            self.assertNotIsInstance(result, OSError)
            promised = Promised()
            promised.kept = {"ABCDE0": MESSAGE, "ABCDE1": MESSAGE}
            if name == "accept":
                promised.kept["ABCDE5"] = MESSAGE
            self.check(platter.now(), promised)

    # -- threads

    def test_a_message_is_not_seen_by_a_reader_before_it_is_safe(self) -> None:
        """Else it might be delivered, and its client told 451."""
        for at in cases(self, range(40)):
            platter = Platter(self.two)
            with self.on(platter):
                spool = self.opened()
                first = platter.count
                platter.fault = lambda number, name, at=first + at: errno.EIO if number == at else 0      # type: ignore[misc]
                platter.on_step = lambda: self.assertNotIn("ABCDE5", list(spool.names()))     # noqa: B023
                result = store(spool, "ABCDE5")
                platter.on_step = lambda: None
                self.assertEqual("ABCDE5" in spool.names(), result is None)

    def test_a_file_system_that_shut_down_and_says_so_late_is_not_believed(self) -> None:
        """XFS: a folder's fsync returns 0 though the journal is gone, when its change was dropped just before."""
        platter = Platter(self.two)
        with self.on(platter):
            spool = self.opened()
            real_fsync, real_fstat, down = platter.fsync, platter.fstat, [False]

            def fsync(fd: int) -> None:
                down[0] = down[0] or platter.files[fd][0].is_folder
                if not down[0]:
                    real_fsync(fd)

            def fstat(fd: int) -> Any:
                if down[0]:
                    raise OSError(errno.EIO, "I/O error")
                return real_fstat(fd)
            platter.fsync, platter.fstat = fsync, fstat         # type: ignore[method-assign]
            self.assertIsInstance(store(spool, "ABCDE5"), OSError)
            self.assertTrue(spool.sick)

    def test_an_error_that_another_threads_fsync_has_met_is_not_swallowed(self) -> None:
        """Linux tells an error of a folder once to each open file: to those opened before it."""
        platter = Platter(self.two)
        lost: Dict[int, bool] = {}              # descriptor: whether an error awaits its next fsync

        def step() -> None:
            for fd in platter.files:
                lost.setdefault(fd, False)
        real_fsync, real_rename = platter.fsync, platter.rename

        def rename(old: str, new: str) -> None:
            real_rename(old, new)
            if new.endswith("ABCDE5.json"):     # written back now, in vain; and somebody else asks first
                step()
                for fd in lost:
                    lost[fd] = True
                with contextlib.suppress(OSError):
                    spool.update("ABCDE0", lambda sidecar: sidecar.update(held=["a.example"]))
                with contextlib.suppress(OSError):
                    platter.fsync(spool.directory)

        def fsync(fd: int) -> None:
            if lost.pop(fd, False):
                raise OSError(errno.EIO, "I/O error")
            real_fsync(fd)
        with self.on(platter):
            spool = self.opened()
            platter.rename, platter.fsync = rename, fsync       # type: ignore[method-assign]
            self.assertIsInstance(store(spool, "ABCDE5"), OSError)


class SpoolPeople(SpoolCase):
    """What people do to a directory, and what other programs left in it."""

    def setUp(self) -> None:
        super().setUp()
        self.spool = opened(self.path)
        self.addCleanup(self.spool.close)
        self.assertIsNone(store(self.spool, "ABCDE0"))

    def at(self, *parts: str) -> str:
        return os.path.join(self.path, *parts)

    def test_a_sidecar_that_people_wrote_again_is_listed_like_any_other(self) -> None:
        sidecar = dict(self.spool.read_sidecar("ABCDE0"), sender="j\u00fcrgen@sender.example", smtputf8=True)
        with open(self.at("ABCDE0.json"), "w", encoding="utf-8") as file:
            json.dump(sidecar, file, ensure_ascii=False, indent=2)          # as jq does
        self.assertEqual(self.spool.peek_sidecar("ABCDE0"), self.spool.read_sidecar("ABCDE0"))
        answers = [{"site": DOMAIN, "notices": False, "error": "", "rows": [["ABCDE0", "queued", None, 0.0, 0]]}, {"exit": 0}]
        out = io.StringIO()
        with mock.patch.object(etrn, "ask_relay", return_value=answers), contextlib.redirect_stdout(out):
            self.assertEqual(etrn.show_queue(config("spool = " + self.path), "all", True), 0)
        self.assertEqual([row["sender"] for row in json.loads(out.getvalue())], [sidecar["sender"]])
        self.assertTrue(gc.isenabled())

    def test_what_is_no_file_is_set_aside_and_waited_for_by_nobody(self) -> None:
        os.mkfifo(self.at("ABCDE1.json"))
        os.mkdir(self.at("ABCDE2.json"))
        os.symlink("ABCDE3.json", self.at("ABCDE3.json"))
        os.symlink("nowhere", self.at("ABCDE4.json"))
        for id in ("ABCDE5", "ABCDE6"):
            self.assertIsNone(store(self.spool, id))
            os.unlink(self.at(id + ".eml"))
        os.mkdir(self.at("ABCDE5.eml"))
        os.mkfifo(self.at("ABCDE6.eml"))
        for id in cases(self, ["ABCDE%d" % number for number in range(1, 7)]):
            with self.assertRaises(etrn.Corrupt):
                self.spool.check_body(id, self.spool.read_sidecar(id))
            with self.assertRaises(etrn.Corrupt):
                self.spool.read_message(id, self.spool.read_sidecar(id))
            self.assertIn("moved to corrupt/", self.spool.set_aside(id, "why"))
        self.assertEqual(list(self.spool.names()), ["ABCDE0"])

    @unittest.skipIf(os.geteuid() != 0, "only root can give files to somebody else")
    def test_a_file_of_another_owner_is_set_aside(self) -> None:
        self.assertIsNone(store(self.spool, "ABCDE1"))
        self.assertIsNone(store(self.spool, "ABCDE2"))
        os.chmod(self.folder, 0o755)
        for path, _, names in os.walk(self.path):
            for one in [path] + [os.path.join(path, name) for name in names]:
                if "ABCDE1.json" not in one and "ABCDE2.eml" not in one:
                    os.chown(one, 65534, 65534)
        os.seteuid(65534)
        try:
            self.assertRaisesRegex(etrn.Corrupt, "Permission denied", self.spool.read_sidecar, "ABCDE1")
            sidecar = self.spool.read_sidecar("ABCDE2")
            self.assertRaisesRegex(etrn.Corrupt, "Permission denied", self.spool.check_body, "ABCDE2", sidecar)
            self.assertIn("moved to corrupt/: ABCDE1.json ABCDE1.eml", self.spool.set_aside("ABCDE1", "why"))
        finally:
            os.seteuid(0)

    def test_a_disk_that_does_not_give_a_file_corrupts_nothing(self) -> None:
        for fault in cases(self, [errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM]):
            with mock.patch.object(etrn.os, "open", side_effect=OSError(fault, os.strerror(fault))):
                for read in (self.spool.read_sidecar, self.spool.read_header):
                    with self.assertRaises(OSError) as caught:
                        read("ABCDE0")
                    self.assertEqual(caught.exception.errno, fault)

    def test_a_queue_id_in_use_is_not_taken_again(self) -> None:
        shutil.copy(self.at("ABCDE0.eml"), self.at("ABCDE1.eml"))
        for id in cases(self, ["ABCDE0", "ABCDE1"]):
            self.assertEqual(getattr(store(self.spool, id, b"another"), "errno", None), errno.EEXIST)
        self.assertEqual(recover_open(self.spool), {"ABCDE0": MESSAGE})

    def test_a_read_that_comes_in_pieces_is_whole(self) -> None:
        self.assertIsNone(store(self.spool, "ABCDE1", MESSAGE * 9000))
        real = os.read
        with mock.patch.object(etrn.os, "read", lambda fd, most: real(fd, min(most, 4099))):
            self.assertEqual(recover_open(self.spool), {"ABCDE0": MESSAGE, "ABCDE1": MESSAGE * 9000})

    def test_a_spool_may_be_a_link(self) -> None:
        link = os.path.join(self.folder, "link")
        self.spool.close()
        os.symlink(self.path, link)
        self.assertEqual(recover(link), {"ABCDE0": MESSAGE})
        os.unlink(link)
        os.symlink("nowhere", link)
        self.assertRaises(OSError, etrn.Spool(link).open)

    def test_a_start_needs_no_space_and_no_right_to_the_folder_above(self) -> None:
        self.spool.close()
        real = os.open

        def refusing(path: str, flags: int, *mode: int) -> int:
            if path == self.folder:
                raise PermissionError(errno.EACCES, "Permission denied")
            return real(path, flags, *mode)
        with mock.patch.object(etrn.os, "open", refusing), \
                mock.patch.object(etrn.os, "write", side_effect=OSError(errno.ENOSPC, "full")):
            self.assertEqual(recover(self.path), {"ABCDE0": MESSAGE})

    def test_odd_things_in_its_folders_do_not_keep_it_from_starting(self) -> None:
        for folder in ("incoming", "done"):
            os.makedirs(self.at(folder, "ABCDE0.json", "x"))
            os.makedirs(self.at(folder, "ABCDE8.eml", "x"))
        self.spool.close()
        self.assertEqual(recover(self.path), {"ABCDE0": MESSAGE})

    def test_folders_that_somebody_removed_are_made_again(self) -> None:
        for folder in cases(self, ["incoming", "done", "corrupt"]):
            self.assertIsNone(store(self.spool, "ABCDE1"))
            shutil.rmtree(self.at(folder))
            error = store(self.spool, "ABCDE2")
            self.assertEqual(error is not None, folder == "incoming")
            self.assertEqual(bool(self.spool.sick), folder == "incoming")
            self.assertEqual(self.spool.remove(["ABCDE1"]), [None])
            self.assertEqual(self.spool.has_sidecar("ABCDE1"), False)
            self.assertTrue(self.spool.heal())
            self.assertIsNone(store(self.spool, "ABCDE3"))
            for id in ("ABCDE2", "ABCDE3"):
                self.assertIn("moved to" if self.spool.has_sidecar(id) else "nothing left", self.spool.set_aside(id, "why"))
        self.assertEqual(recover_open(self.spool), {"ABCDE0": MESSAGE})

    def test_a_spool_that_was_unmounted_takes_nothing_and_loses_nothing(self) -> None:
        away = self.path + ".away"
        os.rename(self.path, away)
        for there in cases(self, [False, True]):
            if there:
                os.makedirs(self.at("incoming"))            # as if it were the folder below the mount point
            self.assertIsInstance(store(self.spool, "ABCDE1"), OSError)
            self.assertFalse(self.spool.heal())
            self.spool.sick = "away"
            for act in (lambda: self.spool.read_sidecar("ABCDE0"), lambda: self.spool.set_aside("ABCDE0", "why")):
                with self.assertRaises(OSError) as caught:
                    act()
                self.assertEqual(caught.exception.errno, errno.ESTALE)
        shutil.rmtree(self.path)
        os.rename(away, self.path)
        self.assertTrue(self.spool.heal())
        self.assertIsNone(store(self.spool, "ABCDE1"))
        self.assertEqual(recover_open(self.spool), {"ABCDE0": MESSAGE, "ABCDE1": MESSAGE})

    def test_a_full_disk_does_not_keep_what_was_delivered(self) -> None:
        for fault in cases(self, [errno.ENOSPC, errno.EDQUOT]):
            self.assertIsNone(store(self.spool, "ABCDE1"))
            with mock.patch.object(etrn.os, "rename", side_effect=OSError(fault, os.strerror(fault))):
                self.assertEqual(self.spool.remove(["ABCDE1"]), [None])
            self.assertEqual(recover_open(self.spool), {"ABCDE0": MESSAGE})

    def test_only_files_of_our_own_making_are_used_again(self) -> None:
        """Others are somebody's copy, or are being read."""
        outside = os.path.join(self.folder, "outside")
        with open(outside, "wb") as file:
            file.write(MESSAGE)
        body = self.at("ABCDE1.eml")

        def read_on() -> None:
            self.message = self.spool.read_message("ABCDE1", self.spool.read_sidecar("ABCDE1"))
        for data, do, is_used in cases(self, [
                (MESSAGE, lambda: None, True), (MESSAGE, lambda: os.link(body, outside + ".link"), False),
                (MESSAGE, lambda: os.chmod(body, 0o644), False), (MESSAGE * 9000, read_on, False),
                (MESSAGE, lambda: (os.unlink(body), os.symlink(outside, body)), False)]):
            self.spool.spares.clear()
            self.assertIsNone(store(self.spool, "ABCDE1", data))
            do()
            self.spool.spares.clear()
            self.assertEqual(self.spool.remove(["ABCDE1"]), [None])
            self.assertEqual("ABCDE1.eml" in self.spool.spares, is_used)
            self.assertEqual(os.path.lexists(self.at("done", "ABCDE1.eml")), is_used)
            self.assertIsNone(store(self.spool, "ABCDE2", b"another"))
            self.spool.remove(["ABCDE2"])
        self.assertEqual(b"".join(self.message.blocks()), MESSAGE * 9000)
        self.message.close()
        for path in (outside, outside + ".link"):
            with open(path, "rb") as file:
                self.assertEqual(file.read(), MESSAGE)

    # -- what others wrote

    NASTY: List[Any] = [None, True, False, 0, -1, 5, 1e308, -0.5, float("nan"), float("inf"), 10 ** 30, 10 ** 400, "", "x",
                        "a b", "x\r\ny", "\ud800", "a@b@c", "\0", [], [None], ["x"], {}, {"x": 1}]

    def variants(self, good: Any) -> Iterator[Any]:
        """The same with any one value changed or missing."""
        places: List[Tuple[Any, ...]] = []

        def walk(value: Any, path: Tuple[Any, ...]) -> None:
            for key, one in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
                places.append((*path, key))
                walk(one, (*path, key))
        walk(good, ())
        for place in places:
            for nasty in [*self.NASTY, ...]:
                changed = json.loads(json.dumps(good))
                target = changed
                for key in place[:-1]:
                    target = target[key]
                if nasty is ...:
                    del target[place[-1]]
                else:
                    target[place[-1]] = nasty
                yield changed

    def test_a_sidecar_either_makes_sense_or_is_corrupt(self) -> None:
        """Nothing that passes makes anything fail later."""
        os.unlink(self.at("ABCDE0.json"))
        good = sidecar_of("ABCDE0", ["user@" + DOMAIN, "other@" + DOMAIN], size=len(MESSAGE), ret="HDRS", envid="x+20y",
                          sha256=hashlib.sha256(MESSAGE).hexdigest(), held=["two.example"])
        good["recipients"][1].update(attempts=3, last_attempt=good["received"], last_status="4.2.0", refused_since=5.0,
                                     last_response="450 4.2.0 no", last_remote="mail.example", orcpt="rfc822;x", notify="NEVER")
        passed = refused = 0
        for sidecar in cases(self, [good, *self.variants(good)]):
            try:
                found = etrn.parse_sidecar(json.dumps(sidecar).encode("ascii"), "ABCDE0")
            except etrn.Corrupt as error:
                refused += 1
                self.assertNotIn("\n", str(error))
                continue
            passed += 1
            self.assertTrue(etrn.summarize(found).domains)
            for one in found["recipients"]:     # one that is finished by somebody's typing error is lost
                self.assertIn(one["state"], [etrn.QUEUED, etrn.DELIVERED, etrn.BOUNCED, etrn.EXPIRED, etrn.DELETED])
            etrn.format_sidecar(found)
            etrn.format_envelope(found, b"Subject: x\r\n", 1764000000.0)
            site = {"notices": False, "site": DOMAIN, "error": ""}
            json.dumps(list(etrn.queue_rows(found, site, "queued", None, 0.0, 0))).encode("ascii")
            for one in found["recipients"]:
                one["last_status"] = one["last_status"] or "4.4.7"
                for address in (one["address"], found["sender"]):
                    address.encode("utf-8")
            for action in ("failed", "delayed", "relayed"):
                notices, _ = etrn.send_notice(self.spool, dict(found, sender="a@b.example"), action, found["recipients"],
                                              config(), etrn.Ids(), 1764000000.0)
                for notice in notices:
                    self.spool.remove([notice["id"]])
        self.assertGreater(refused, 500)
        self.assertGreater(passed, 30)

    def test_a_state_file_of_any_content_costs_only_what_was_learned(self) -> None:
        clock = Clock()
        state = {"format": 1, "sites": {DOMAIN: {
            "primary": "down", "since": 5.0, "recovered": 0.0, "pardoned": 0.0, "last_error": "x", "held": True, "size_limit": 5,
            "route": [["m.example", "192.0.2.1", 25]], "route_seen": 5.0, "counters": {"accepted": 1},
            "route_of": etrn.format_primary(config().domains[DOMAIN].primary)}}}
        recipients = {"format": 1, "recipients": {"a@" + DOMAIN: [True, 5e9]}, "accept_all": {DOMAIN: [False, 5e9]}}
        rows = [(one, recipients) for one in self.variants(state)] + [(state, one) for one in self.variants(recipients)]
        log = etrn.Log("stderr", "error", "x")
        for one, other in cases(self, rows):
            spool = mock.Mock(free=lambda: 0, load_state=lambda name="state.json", one=one, other=other: json.loads(
                json.dumps(one if name == "state.json" else other)))
            with mock.patch.object(etrn, "Committers"):
                manager = etrn.Manager(config(), spool, log, lambda report: None, clock.now)
            manager.load_state()
            manager.save_state()
            manager.wake(clock.now)
            manager.tick(clock.advance(5))
            for site in manager.scheduler.sites.values():
                etrn.format_duration(clock.now.wall - site.since)
                site.is_recovering(clock.now)
        self.assertEqual(log.lines, [])
        for data in cases(self, [b"[" * 200000, b"\0", b"{}", b'{"sites": []}', b'{"sites": 5}']):
            with open(self.at("state.json"), "wb") as file:
                file.write(data)
            self.assertIsInstance(self.spool.load_state(), dict)

    def test_an_older_state_never_overwrites_a_newer_one(self) -> None:
        for number in (2, 1):
            self.spool.save_state({"number": number}, {"number": number}, number)
        self.assertEqual([self.spool.load_state(name)["number"] for name in ("state.json", "recipients.json")], [2, 2])

    # -- committers

    def test_a_bug_is_told_to_those_it_concerns_and_nobody_hears_done(self) -> None:
        for broken, expected in cases(self, [("commit", ["bug", "bug", "task"]), ("remove", ["kept", "bug", "task"]),
                                             ("task", ["kept", "removed", "bug"])]):
            with contextlib.ExitStack() as stack:
                if broken != "task":
                    stack.enter_context(mock.patch.object(self.spool, broken, side_effect=RuntimeError("a bug")))
                committers = etrn.Committers(self.spool, lambda reports: None)
                heard: Dict[str, Any] = {}

                def task(spool: etrn.Spool, broken: str = broken) -> str:
                    if broken == "task":
                        raise RuntimeError("a bug")
                    return "task"
                batch = [(etrn.Commit(etrn.Draft("ABCDE1"), [MESSAGE], sidecar_of("ABCDE1")), "kept"),
                         (etrn.Remove("ABCDE7"), "removed"), (etrn.Task(task), "task")]
                told = committers._work(batch[:2]) + committers._work(batch[2:])    # type: ignore[arg-type]
                heard = dict(told)              # type: ignore[arg-type]
            self.assertEqual(len(told), 3)
            self.assertEqual(["bug" if isinstance(heard[name], RuntimeError) else heard[name] or name
                              for name in ("kept", "removed", "task")], expected)
            self.spool.remove(["ABCDE1"])

    def test_a_body_that_a_bug_left_open_is_given_up(self) -> None:
        draft = etrn.Draft("ABCDE1")
        self.spool.append(draft, [b"one"])
        draft.error = OSError(errno.EIO, "a bug")           # as the loop notes it
        self.assertIsNotNone(self.spool.commit([(draft, [b"two"], sidecar_of("ABCDE1"))])[0])
        self.assertEqual((draft.fd, os.listdir(self.at("incoming"))), (-1, []))


class Stepping:
    """Stands for a module within etrn_relay.  `on_step` is told the name of each of some functions before it is called."""

    def __init__(self, real: Any, names: Sequence[str], on_step: Callable[[str], None]) -> None:
        self.real, self.names, self.on_step = real, names, on_step

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.real, name)
        if name not in self.names:
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            self.on_step(name)
            return found(*arguments, **options)
        return call


class Clerks(SpoolCase):
    """The process that writes small messages, and the threads that hand them to it."""

    def setUp(self) -> None:
        super().setUp()
        self.spool = opened(self.path)
        self.addCleanup(self.spool.close)
        self.told: List[Tuple[Any, Any]] = []

    def clerk(self, on_step: Optional[Callable[[str], None]] = None, spool: Optional[etrn.Spool] = None) -> etrn.Clerk:
        """`on_step`: in the clerk, before each call that changes files, and before it answers."""
        with contextlib.ExitStack() as stack:
            if on_step is not None:
                stack.enter_context(mock.patch.object(etrn, "os", Stepping(os, Disk.COUNTED, on_step)))
                stack.enter_context(mock.patch.object(etrn, "marshal", Stepping(etrn.marshal, ["dumps"], on_step)))
            clerk = fork_clerk(spool or self.spool)
        self.addCleanup(clerk.end)
        return clerk

    def committers(self, clerk: Optional[etrn.Clerk] = None, spool: Optional[etrn.Spool] = None) -> etrn.Committers:
        """On a disk so quick that one batch at a time is under way."""
        committers = etrn.Committers(spool or self.spool, self.told.extend, "lost")        # type: ignore[arg-type]
        committers.clerk = clerk
        committers.fsyncs_s.append(0.0)
        return committers

    @staticmethod
    def mail(id: str, *blocks: bytes) -> etrn.Commit:
        return etrn.Commit(etrn.Draft(id), list(blocks or [MESSAGE]), sidecar_of(id))

    def left_in(self, spool: etrn.Spool) -> List[str]:
        return os.listdir(spool.incoming) + sorted(spool.entering)

    # -- as the spool does it

    def test_a_clerk_keeps_and_removes_as_the_spool_does(self) -> None:
        clerk = self.clerk()
        batch = [self.mail("ABCDE1", MESSAGE, b"and more\r\n"), self.mail("ABCDE2", b"")]
        self.assertEqual(clerk.commit(batch), [None, None])
        self.assertEqual(recover_open(self.spool), {"ABCDE1": MESSAGE + b"and more\r\n", "ABCDE2": b""})
        self.assertEqual([self.spool.read_sidecar(one.draft.id) for one in batch], [one.sidecar for one in batch])
        self.assertEqual(clerk.remove(["ABCDE2", "ABCDE1", "ABCDE0"]), [None] * 3)
        self.assertEqual((spool_files(self.path), self.left_in(self.spool)), ([], []))
        self.assertTrue(clerk.process)

    def test_answers_come_in_the_order_of_the_batch_whoever_writes(self) -> None:
        self.assertIsNone(store(self.spool, "ABCDE4"))
        clerk = self.clerk()
        asked: List[str] = []
        real = clerk._write

        def write(request: Any) -> None:
            asked.extend(id for id, _, _ in request[1])
            real(request)
        clerk._write = write            # type: ignore[method-assign]
        large = b"x" * etrn.CLERK_OCTETS
        batch = [self.mail("ABCDE0"), self.mail("ABCDE1", large, b"y"), self.mail("ABCDE2"), self.mail("ABCDE3", b"second"),
                 self.mail("ABCDE4"), self.mail("ABCDE5"), self.mail("ABCDE6", large)]
        self.spool.append(batch[3].draft, [b"first, "])
        batch[5].draft.error = OSError(errno.EDQUOT, "a quota")
        told = clerk.commit(batch)
        self.assertEqual([one and one.errno for one in told], [None] * 4 + [errno.EEXIST, errno.EDQUOT, None])
        self.assertEqual(asked, ["ABCDE0", "ABCDE2", "ABCDE4", "ABCDE6"])
        self.assertEqual(recover_open(self.spool), {
            "ABCDE0": MESSAGE, "ABCDE1": large + b"y", "ABCDE2": MESSAGE, "ABCDE3": b"first, second", "ABCDE4": MESSAGE,
            "ABCDE6": large})
        self.assertEqual([self.spool.read_sidecar(one.draft.id) for one in batch[:4]], [one.sidecar for one in batch[:4]])
        self.assertEqual(self.left_in(self.spool), [])

    def test_nobody_reads_what_the_clerk_has_not_been_heard_of(self) -> None:
        clerk = self.clerk()
        seen: List[str] = []
        real = clerk._read

        def read() -> Any:
            answer = real()
            seen.extend([*spool_files(self.path), *self.spool.names()])
            return answer
        clerk._read = read              # type: ignore[method-assign]
        self.assertEqual(clerk.commit([self.mail("ABCDE1")]), [None])
        self.assertEqual((seen, list(self.spool.names())), (["ABCDE1.eml", "ABCDE1.json"], ["ABCDE1"]))

    def test_all_of_a_batch_is_written_before_any_of_it_is_synced_and_that_before_any_enters(self) -> None:
        steps: List[str] = []
        names = ("write", "posix_fadvise", "fsync", "rename")
        with mock.patch.object(etrn, "os", Stepping(os, names, steps.append)):
            self.assertEqual(self.spool.commit([self.mail("ABCDE%d" % number) for number in range(3)]), [None] * 3)
        self.assertEqual(steps, ["write", "posix_fadvise"] * 6 + ["fsync"] * 6 + ["rename"] * 6 + ["fsync"])

    def test_advice_that_the_kernel_does_not_take_costs_nothing(self) -> None:
        def refuse(*_: Any) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")
        for number, shim in enumerate(cases(self, [
                types.SimpleNamespace(**dict(vars(os), posix_fadvise=refuse)),
                types.SimpleNamespace(**{name: value for name, value in vars(os).items() if name != "posix_fadvise"})])):
            with mock.patch.object(etrn, "os", shim):
                self.assertIsNone(store(self.spool, "ABCDE%d" % number))

    # -- its end

    def test_a_clerk_killed_at_any_moment_costs_no_message_and_no_answer(self) -> None:
        ids = ["ABCDE1", "ABCDE2", "ABCDE3"]
        for at in itertools.count():
            self.row = at
            left = [at]

            def on_step(_: str, left: List[int] = left) -> None:
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
            spool = opened(self.fresh())
            self.assertIsNone(store(spool, "ABCDE0"))
            clerk = self.clerk(on_step, spool)
            committers = self.committers(clerk, spool)
            self.told.clear()
            told = committers._work([*((self.mail(id), id) for id in ids), (etrn.Remove("ABCDE0"), "gone")])   # type: ignore[misc]
            self.assertEqual(told, [*((id, None) for id in ids), ("gone", None)])
            self.assertEqual(recover_open(spool), dict.fromkeys(ids, MESSAGE))
            self.assertEqual(self.left_in(spool), [])
            is_lost = committers.clerk is None
            self.assertEqual((self.told, clerk.process == 0), ([("lost", None)] if is_lost else [], is_lost))
            committers.stop()
            spool.close()
            self.assertEqual(recover(spool.path), dict.fromkeys(ids, MESSAGE))
            if not is_lost:
                break
        self.assertGreater(self.row, 40)
        del self.row

    def test_a_clerk_killed_while_it_had_nothing_to_do_is_missed_by_nobody(self) -> None:
        for number, ignored in enumerate(cases(self, [signal.SIG_DFL, signal.SIG_IGN])):
            self.addCleanup(signal.signal, signal.SIGCHLD, signal.signal(signal.SIGCHLD, ignored))      # by whoever started us
            clerk = self.clerk()
            committers = self.committers(clerk)
            pid = clerk.process
            os.kill(pid, signal.SIGKILL)
            self.assertEqual(signal.getsignal(signal.SIGCHLD), signal.SIG_DFL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            for id in ("ABCDE%d" % number, "ABCDF%d" % number):
                told = committers._work([(self.mail(id), "kept"), (etrn.Remove("ABCDE9"), "gone")])     # type: ignore[list-item]
                self.assertEqual(told, [("kept", None), ("gone", None)])
            self.assertIsNone(committers.clerk)
            self.assertRaises(ChildProcessError, os.waitpid, pid, 0)
            committers.stop()
        self.assertEqual((len(recover_open(self.spool)), self.told), (4, [("lost", None)] * 2))

    def test_the_end_waits_for_a_slow_disk_and_not_for_one_that_stands_still(self) -> None:
        goes_on = threading.Event()
        self.addCleanup(goes_on.set)
        for pauses, is_done in cases(self, [([0.4] * 8, True), ([0.0, DEADLINE_S], False)]):
            committers = self.committers()
            for pause in pauses:
                committers.submit(etrn.Task(lambda spool, pause=pause: goes_on.wait(pause)), "done")        # type: ignore
            self.assertEqual(committers.stop(1.2), is_done)

    def test_an_answer_is_never_taken_for_that_of_another_request(self) -> None:
        for fault in cases(self, [MemoryError(), ValueError("bad marshal data"), OSError(errno.ENOMEM, "no memory")]):
            self.assertIsNone(store(self.spool, "ABCDE0"))
            committers = self.committers(self.clerk())
            with mock.patch.object(etrn.marshal, "loads", side_effect=fault):
                self.assertEqual(committers._work([(self.mail("ABCDE1"), "kept")]), [("kept", None)])     # type: ignore[list-item]
            (_, error), = committers._work([(self.mail("ABCDE0"), "twice")])                              # type: ignore[list-item]
            self.assertEqual(error and error.errno, errno.EEXIST)
            self.spool.remove(["ABCDE0", "ABCDE1"])

    def test_a_bug_in_the_clerk_is_told_on_standard_error_and_costs_nothing(self) -> None:
        def on_step(name: str) -> None:
            if name == "rename":
                raise RuntimeError("a bug")
        errors = tempfile.TemporaryFile()
        self.addCleanup(errors.close)
        with mock.patch.object(sys, "stderr", io.TextIOWrapper(io.FileIO(errors.fileno(), "w", closefd=False))):    # type: ignore[type-var]
            clerk = self.clerk(on_step)
        self.assertEqual(clerk.commit([self.mail("ABCDE1"), self.mail("ABCDE2")]), [None, None])
        self.assertEqual((clerk.process, sorted(recover_open(self.spool)), self.left_in(self.spool)),
                         (0, ["ABCDE1", "ABCDE2"], []))
        errors.seek(0)
        self.assertRegex(errors.read().decode(), r"\ATraceback [^\0]*RuntimeError: a bug\n\Z")

    def test_a_clerk_that_cannot_say_what_is_wrong_ends_all_the_same(self) -> None:
        """Its code must not go on where the relay's does."""
        ours = os.getpid()
        with mock.patch.object(etrn, "traceback", None):
            try:
                clerk = self.clerk(lambda name: 1 // 0)         # type: ignore[arg-type, return-value]
            finally:
                if os.getpid() != ours:
                    os._exit(99)
        clerk._write(("remove", ["ABCDE1"]))
        found = os.waitid(os.P_PID, clerk.process, os.WEXITED | os.WNOWAIT)
        self.assertEqual(found and found.si_status, 1)

    def test_a_clerk_ends_when_the_relay_is_gone_and_for_no_other_signal(self) -> None:
        clerk = self.clerk()
        self.assertEqual(clerk.commit([]), [])              # it is up
        for number in cases(self, [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]):
            os.kill(clerk.process, number)
            self.assertEqual(clerk.commit([]), [])
            self.assertTrue(clerk.process)
        pid, clerk.process = clerk.process, 0
        clerk.end()                                         # closes alone, as the kernel does for a relay that is gone
        try:
            self.assertEqual(wait(lambda: os.waitpid(pid, os.WNOHANG)[0] and True, "its end", 5.0), True)
        except AssertionError:
            os.kill(pid, signal.SIGKILL)
            raise

    def test_a_clerk_that_was_stopped_holds_no_end_up(self) -> None:
        committers = self.committers(self.clerk())
        assert committers.clerk is not None
        pid = committers.clerk.process
        os.kill(pid, signal.SIGSTOP)
        thread = threading.Thread(target=committers.stop, daemon=True)
        thread.start()
        try:
            wait(lambda: not thread.is_alive(), "the end", 5.0)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            thread.join(DEADLINE_S)

    def test_without_a_process_the_relay_writes_itself(self) -> None:
        with mock.patch.object(etrn.os, "fork", side_effect=OSError(errno.EAGAIN, "Resource temporarily unavailable")):
            before = len(os.listdir("/proc/self/fd"))
            self.assertRaises(OSError, etrn.Clerk, self.spool, lambda: None)
            self.assertEqual(len(os.listdir("/proc/self/fd")), before)
        committers = self.committers()
        self.assertEqual(committers._work([(self.mail("ABCDE1"), "kept")]), [("kept", None)])             # type: ignore[list-item]
        committers.stop()
        self.assertEqual((list(recover_open(self.spool)), self.told), (["ABCDE1"], []))

    def test_there_is_a_descriptor_for_each_clients_socket_body_and_sidecar(self) -> None:
        """Those of a batch are all open at once."""
        asked: List[Any] = []
        fake = types.SimpleNamespace(RLIMIT_NOFILE=7, RLIM_INFINITY=-1, getrlimit=lambda _: (64, 99999),
                                     setrlimit=lambda _, both: asked.append(both))
        with mock.patch.object(etrn, "resource", fake):
            etrn.Server._reserve_files(mock.Mock(page=None, cfg=config("max_connections = 500")))
        self.assertEqual(asked, [(3 * 500 + 2 * etrn.LINES_MAX + etrn.RESERVED_FILES, 99999)])

    # -- a disk that fails it

    def test_each_failure_of_the_clerks_disk_is_told_and_leaves_nothing(self) -> None:
        calls = [("open", 0), ("open", 1), ("open", 2), ("write", 0), ("write", 1), ("fsync", 0), ("fsync", 1), ("fsync", 2),
                 ("rename", 0), ("rename", 1)]
        for number, ((name, nth), fault) in enumerate(cases(self, itertools.product(calls, SpoolFaults.ERRORS))):
            left = [nth]

            def on_step(step: str, name: str = name, fault: int = fault, left: List[int] = left) -> None:
                if step == name:
                    left[0] -= 1
                    if left[0] == -1:
                        raise OSError(fault, os.strerror(fault))
            clerk = self.clerk(on_step)
            self.assertEqual(clerk.commit([]), [])          # it is up
            left_open = len(os.listdir("/proc/%d/fd" % clerk.process))
            error, = clerk.commit([self.mail("ABC%03d" % number)])
            assert error is not None
            self.assertEqual((error.errno, error.strerror), (fault, os.strerror(fault)))
            self.assertEqual(str(etrn.disk_reply(error))[:9],
                             "452 4.3.1" if fault in (errno.ENOSPC, errno.EDQUOT) else "451 4.3.0")
            self.assertEqual(bool(self.spool.sick), fault in (errno.EIO, errno.EROFS))
            self.assertEqual((spool_files(self.path), self.left_in(self.spool)), ([], []))
            self.assertTrue(self.spool.heal())
            self.assertEqual((clerk.commit([self.mail("ABD%03d" % number)]), self.spool.sick), ([None], ""))
            self.assertEqual(clerk.remove(["ABD%03d" % number]), [None])
            self.assertEqual(len(os.listdir("/proc/%d/fd" % clerk.process)), left_open)
            clerk.end()

    def test_an_illness_is_not_forgotten_because_the_clerk_is_well(self) -> None:
        clerk = self.clerk()
        self.spool.sick = "Input/output error"
        self.assertEqual((clerk.commit([self.mail("ABCDE1")]), self.spool.sick), ([None], "Input/output error"))

    # -- committers

    def test_a_task_that_takes_long_holds_no_mail_up(self) -> None:
        for number in cases(self, [1, 2, 5]):
            committers = self.committers()
            self.told.clear()
            is_over = threading.Event()
            try:
                for _ in range(number):
                    committers.submit(etrn.Task(lambda spool, is_over=is_over: is_over.wait(DEADLINE_S)), "task")  # type: ignore[arg-type, misc]
                wait(lambda committers=committers, number=number: committers.tasking == min(number, 2), "the tasks to begin")
                committers.submit(self.mail("ABCDE%d" % number), "kept")                                           # type: ignore[arg-type]
                wait(lambda: self.told, "the message", 5.0)
                self.assertEqual(self.told, [("kept", None)])
            finally:
                is_over.set()
                committers.stop()
            self.assertEqual(self.told, [("kept", None)] + [("task", True)] * number)

    def test_what_comes_at_once_wakes_a_thread_each(self) -> None:
        committers = self.committers()
        is_over = threading.Event()

        def slowly(batch: Sequence[etrn.Commit]) -> List[None]:
            is_over.wait(DEADLINE_S)
            return [None] * len(batch)
        with mock.patch.object(self.spool, "commit", slowly):
            try:
                committers.submit(etrn.Task(lambda spool: "first"), "task")                                        # type: ignore[arg-type]
                wait(lambda: committers.idle, "a thread with nothing to do")
                with committers.condition:
                    committers.submit(self.mail("ABCDE1"), "kept")                                                 # type: ignore[arg-type]
                    committers.submit(etrn.Task(lambda spool: "second"), "task")                                   # type: ignore[arg-type]
                wait(lambda: ("task", "second") in self.told, "the task", 5.0)
                self.assertNotIn(("kept", None), self.told)
            finally:
                is_over.set()
                committers.stop()
        self.assertEqual(self.told[-1], ("kept", None))

    # -- the lock

    def test_a_start_waits_for_the_clerk_of_a_relay_that_was_killed(self) -> None:
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        lock = os.path.join(self.path, "lock")
        for holder, waits in cases(self, [(b"%d\n" % gone.pid, True), (b"%d\n" % os.getpid(), False), (b"1\n", False),
                                          (b"", False), (b"\xff\n", False), (b"9" * 20, False), (b"-1\n", False)]):
            slept: List[float] = []

            def sleep(seconds: float, slept: List[float] = slept) -> None:
                slept.append(seconds)
                self.spool.close()
            with open(lock, "r+b") as file:
                file.truncate(0)
                file.write(holder)
            with mock.patch.object(etrn, "time", types.SimpleNamespace(**dict(vars(time), sleep=sleep))):
                if waits:
                    self.spool = opened(self.path)
                    self.assertEqual(slept, [etrn.LOCK_POLL_S])
                else:
                    self.assertRaises(etrn.SpoolBusy, opened, self.path)
                    self.assertEqual(slept, [])
        self.addCleanup(self.spool.close)

    def test_a_clerk_that_does_not_end_is_not_waited_for_for_ever(self) -> None:
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        with open(os.path.join(self.path, "lock"), "r+b") as file:
            file.write(b"%d\n" % gone.pid)
            file.truncate()
        with shorten(LOCK_WAIT_S=0.03), self.assertRaises(etrn.SpoolBusy) as caught:
            opened(self.path)
        self.assertIn("process %d" % gone.pid, str(caught.exception))


def recover_open(spool: etrn.Spool) -> Dict[str, bytes]:
    """The queued messages of an open spool, intact."""
    out = {}
    for id in spool.names():
        message = spool.read_message(id, spool.read_sidecar(id))
        out[id] = b"".join(message.blocks())
        message.close()
    return out


class Recording(SpoolCase):
    """The loop and a disk that does not take what it says: by hand, without threads."""

    def setUp(self) -> None:
        super().setUp()
        self.clock = Clock()
        self.clock.wall = time.time() + 60.0        # what store() makes is due
        self.spool = opened(self.path)
        self.addCleanup(self.spool.close)
        self.log = etrn.Log("stderr", "debug", "x")
        self.log.flush = lambda: None               # type: ignore[method-assign]
        self.reports: List[Any] = []
        self.manager = etrn.Manager(config("", "cutthrough = no\ndelay_notice = 1h"), self.spool, self.log, self.reports.append,
                                    self.clock.now)
        self.manager.may_connect = lambda site: False       # the test is the courier
        self.addCleanup(self.manager.committers.stop)

    def settle(self) -> None:
        """Until nothing is under way."""
        def is_quiet() -> bool:
            while self.reports:
                self.manager.handle(self.reports.pop(0), self.clock.now)
            return not self.manager.chains and not self.manager.is_loading
        wait(is_quiet, "the committers")

    def queue(self, id: str, **values: Any) -> Tuple[etrn.Site, etrn.Entry]:
        self.assertIsNone(store(self.spool, id, **values))
        self.manager.accept(self.spool.read_sidecar(id))
        site = self.manager.scheduler.sites[DOMAIN]
        site.state = etrn.Primary.UP
        return site, site.entries[id]

    def outcome(self, site: etrn.Site, entry: etrn.Entry, **kinds: str) -> None:
        """A courier's report: user="sent", other="deferred"."""
        site.on_started(self.clock.now)
        site.on_connected(self.clock.now)
        taken = site.take(16, self.clock.now)
        self.assertEqual(taken, [entry])
        courier = mock.Mock(jobs={entry.id: entry}, is_greeted=True, is_leaving=True, is_former=False)
        self.manager.couriers[courier] = site
        results = tuple(etrn.Result("%s@%s" % (name, DOMAIN), kind, {"sent": "2.0.0"}.get(kind, "4.2.0"), kind, "mail.example",
                                    None)
                        for name, kind in kinds.items())
        self.manager._on_outcome(etrn.Outcome(courier, etrn.Job(entry.id, DOMAIN), results, True, entry.received, "x", 0.1))
        self.manager.couriers.clear()
        site.on_closed(self.clock.now, "")

    def full(self) -> Any:
        """A disk on which no sidecar can be replaced."""
        return mock.patch.object(self.spool, "replace_sidecar", side_effect=OSError(errno.ENOSPC, "No space left on device"))

    def test_a_deferral_that_cannot_be_written_does_not_keep_the_message_from_being_tried(self) -> None:
        site, entry = self.queue("ABCDE0")
        with self.full():
            for attempt in range(1, 4):
                self.outcome(site, entry, user="deferred")
                self.settle()
                self.assertIs(entry.state, etrn.State.DEFERRED)
                self.assertEqual(entry.attempts, attempt)
                self.clock.advance(hours=2)
                self.manager.tick(self.clock.now)
            self.outcome(site, entry, user="sent")
            self.settle()
        self.assertEqual((site.entries, self.spool.has_sidecar("ABCDE0")), ({}, False))

    def test_a_delivery_to_some_is_written_down_before_the_rest_is_tried(self) -> None:
        site, entry = self.queue("ABCDE0", recipients=["user@" + DOMAIN, "other@" + DOMAIN])
        with self.full():
            self.outcome(site, entry, user="sent", other="deferred")
            self.settle()
            self.assertIs(entry.state, etrn.State.DELIVERING)
        self.manager.tick(self.clock.advance(etrn.RETRY_DISK_S))
        self.settle()
        self.assertIs(entry.state, etrn.State.DEFERRED)
        self.assertEqual([one["state"] for one in self.spool.read_sidecar("ABCDE0")["recipients"]], [etrn.DELIVERED, etrn.QUEUED])

    def test_a_sender_hears_once_however_often_it_takes_to_write_that_down(self) -> None:
        for end in cases(self, [
                lambda site, entry: self.manager.end(site, entry, etrn.EXPIRED, "4.4.7", "x"),
                lambda site, entry: self.manager._tell_delay(site, entry)]):
            site, entry = self.queue("ABCDE0", recipients=["user@" + DOMAIN, "user@two.example"])
            with self.full():
                end(site, entry)
                for _ in range(4):
                    self.settle()
                    self.manager.tick(self.clock.advance(etrn.RETRY_DISK_S))
                self.settle()
            self.manager.tick(self.clock.advance(etrn.RETRY_DISK_S))
            self.settle()
            notices = [id for id in self.spool.names() if self.spool.read_sidecar(id)["kind"] == "notice"]
            self.assertEqual(len(notices), 1)
            self.assertTrue(self.manager.scheduler.holding(notices[0]), "the loop knows of it")
            for id in list(self.spool.names()):
                self.manager._set_aside(id, "done")
            self.settle()

    def test_a_body_that_vanished_does_not_keep_its_end_from_being_told(self) -> None:
        site, entry = self.queue("ABCDE0")
        os.unlink(os.path.join(self.path, "ABCDE0.eml"))
        self.manager.end(site, entry, etrn.EXPIRED, "4.4.7", "x")
        self.settle()
        notice, = self.spool.names()
        self.assertEqual(self.spool.read_sidecar(notice)["kind"], "notice")

    def test_a_primary_that_takes_mail_again_is_itself(self) -> None:
        site, entry = self.queue("ABCDE0")
        site.state, site.last_error, site.rejected_since = etrn.Primary.REJECTING, "", self.clock.wall
        site.on_started(self.clock.now)
        site.on_connected(self.clock.now)
        self.assertEqual(site.take(1, self.clock.now), [entry])
        courier = mock.Mock(jobs={entry.id: entry}, is_greeted=True, is_leaving=True, is_former=False)
        self.manager.couriers[courier] = site
        result = etrn.Result("user@" + DOMAIN, "sent", "2.0.0", "250 2.0.0 taken", "mail.example", None, True)
        self.manager._on_outcome(etrn.Outcome(courier, etrn.Job(entry.id, DOMAIN), (result,), True, entry.received, "x", 0.1))
        self.settle()
        self.assertEqual((site.state, site.last_error), (etrn.Primary.UP, ""))
        self.assertTrue(self.manager.memory.is_good("user@" + DOMAIN, self.clock.wall))
        self.manager.couriers.clear()
        site.on_closed(self.clock.now, "")

    def test_a_delay_is_told_with_the_last_attempt_and_its_own_reason(self) -> None:
        for attempts, status in cases(self, [(0, "4.6.7"), (3, "4.4.1")]):
            site, entry = self.queue("ABCDE%d" % attempts)
            self.spool.update(entry.id, lambda sidecar: sidecar["recipients"][0].update(
                attempts=1, last_attempt=5.0, last_status="5.6.7", last_response="needs SMTPUTF8"))
            site.state, site.last_error, site.last_start = etrn.Primary.DOWN, "Connection refused", self.clock.mono - 10
            site.failures = entry.base + attempts
            self.manager._tell_delay(site, entry)
            self.settle()
            id, = [id for id in self.spool.names() if self.spool.read_sidecar(id)["kind"] == "notice"]
            with open(os.path.join(self.path, id + ".eml"), "rb") as file:
                parts = email.message_from_binary_file(file).get_payload()
            fields = parts[1].get_payload()[1]
            self.assertEqual((fields["Status"], "refused" in fields["Diagnostic-Code"]), (status, attempts > 0))
            last = email.utils.parsedate_to_datetime(fields["Last-Attempt-Date"]).timestamp()
            self.assertAlmostEqual(last, self.clock.wall - 10 if attempts else 5.0, delta=2)
            self.spool.remove([id])

    def test_a_flush_gives_the_reason_of_what_stays(self) -> None:
        site, entry = self.queue("ABCDE0", recipients=["a@" + DOMAIN, "b@" + DOMAIN])
        watch = self.manager.watch([(DOMAIN, entry.id)])
        self.outcome(site, entry, a="deferred", b="sent")
        self.settle()
        self.assertEqual((watch.counts["deferred"], watch.error), (1, "deferred"))

    # -- clocks, floods and neighbours

    def test_a_primary_that_answers_out_of_step_gets_no_chunks(self) -> None:
        site, _ = self.queue("ABCDE0")
        self.assertTrue(self.manager.plan(site).chunking)
        site.on_started(self.clock.now)
        courier = mock.Mock(jobs={}, is_greeted=False, is_out_of_step=True, is_former=False)
        self.manager.couriers[courier] = site
        self.manager._on_finished(etrn.Finished(courier, "x answers RSET with 500", None))
        self.assertFalse(self.manager.plan(site).chunking)
        self.settle()

    def test_a_failed_connection_leaves_what_the_primary_said_of_the_message(self) -> None:
        one = dict(sidecar_of("A")["recipients"][0], refused_since=5.0)
        for said, verdict in cases(self, [(("5.3.4", "too big", "mail.example"), ("5.3.4", "too big", "mail.example")),
                                          (("4.2.0", "later", "mail.example"), ("4.4.1", "refused", ""))]):
            one.update(zip(("last_status", "last_response", "last_remote"), said))
            found = self.manager._judge_failure("refused", DOMAIN, one)
            self.assertEqual((found.status, found.response, found.remote, found.refused_since), (*verdict, 5.0))
        self.assertIsNone(self.manager._judge_failure("refused", "other.example", one))

    def test_a_clock_set_back_costs_no_hold_and_no_knowledge(self) -> None:
        site, _ = self.queue("ABCDE0")
        site.is_held = True
        self.assertEqual(site.recovered, 0.0)
        for seconds in (-300.0, -1e10):
            site.on_clock_jump(self.clock.now, seconds)
            self.assertEqual((site.recovered, site.since >= 0, site.rejected_since >= 0), (0.0, True, True))
        self.manager.save_state()
        wait(self.is_saved, "the state")
        other = etrn.Manager(self.manager.cfg, self.spool, self.log, self.reports.append, self.clock.now)
        other.load_state()
        self.assertTrue(other.scheduler.sites[DOMAIN].is_held)
        with mock.patch.object(self.spool, "load_state", lambda *_: {"sites": {DOMAIN: {"held": True}}}):
            other = etrn.Manager(self.manager.cfg, self.spool, self.log, self.reports.append, self.clock.now)
            other.load_state()          # an order holds although the knowledge is damaged
        self.assertTrue(other.scheduler.sites[DOMAIN].is_held)

    def test_a_clock_that_was_set_is_noticed_before_anything_is_judged_by_it(self) -> None:
        site, entry = self.queue("ABCDE0")
        site.since = site.recovered = self.clock.wall
        site.on_started(self.clock.now)
        site.on_connected(self.clock.now)
        self.assertEqual(site.take(1, self.clock.now), [entry])
        courier = mock.Mock(jobs={entry.id: entry}, is_greeted=True, is_leaving=True, is_former=False)
        self.manager.couriers[courier] = site
        result = etrn.Result("user@" + DOMAIN, "refused", "5.1.1", "550 5.1.1 not yet", "mail.example", self.clock.wall)
        self.clock.jump(2 * site.cfg.recovery_grace)
        self.manager.handle(etrn.Outcome(courier, etrn.Job(entry.id, DOMAIN), (result,), True, entry.received, "x", 0.1),
                            self.clock.now)
        self.settle()
        self.assertEqual((list(site.entries), site.counters["bounced"]), (["ABCDE0"], 0))
        self.manager.couriers.clear()
        site.on_closed(self.clock.now, "")

    def test_the_whole_route_is_remembered_in_its_order(self) -> None:
        site, _ = self.queue("ABCDE0")
        hops = tuple(etrn.Hop("m%d.example" % number, "192.0.2.%d" % number, 25) for number in range(3))
        line = mock.Mock(spec=etrn.Courier, is_former=False)
        self.manager.couriers[line] = site
        self.manager._on_routed(etrn.Routed(line, hops, ""))
        self.manager._keep_route(site, line, hops[1])
        self.assertEqual(site.route, list(hops))
        self.manager._keep_route(site, line, etrn.Hop("x.example", "192.0.2.9", 25))
        self.assertEqual([hop.host for hop in site.route], ["x.example", "m0.example", "m1.example", "m2.example"])
        self.manager.couriers.clear()

    def test_a_connection_that_left_several_in_doubt_makes_the_next_ones_wary(self) -> None:
        site, _ = self.queue("ABCDE0")
        for is_in_doubt, error, is_wary in cases(self, [
                (False, "", False), (True, "lost connection", True), (False, "421 enough", True), (False, "", False)]):
            site.on_started(self.clock.now)
            site.on_connected(self.clock.now)
            courier = etrn.Courier(self.spool, self.manager.plan(site), self.reports.append)
            courier.is_greeted, courier.is_in_doubt = True, is_in_doubt
            self.manager.couriers[courier] = site
            self.manager.handle(etrn.Finished(courier, error, None), self.clock.now)
            self.assertEqual(self.manager.plan(site).is_wary, is_wary)
        self.settle()

    def test_what_a_customers_connection_taught_holds_for_each_of_its_domains(self) -> None:
        sites = tuple(self.manager.scheduler.site(name, self.clock.now) for name in ("one.example", "two.example"))
        courier = mock.Mock(spec=etrn.Turnaround, sites=sites, jobs={}, is_former=False, is_greeted=False, is_out_of_step=True,
                            is_in_doubt=True, on_over=lambda: None)
        self.manager.couriers[courier] = sites[1]
        self.manager.handle(etrn.Finished(courier, "lost connection", None), self.clock.now)
        self.assertEqual([(site.is_odd, site.is_wary) for site in sites], [(True, True)] * 2)

    def test_what_the_reader_of_the_spool_finds_too_early_waits_for_its_own_report(self) -> None:
        for error, left in cases(self, [(None, ["ABCDE0"]), (OSError(5, "Input/output error"), [])]):
            told: List[Any] = []

            def then(result: Any, told: List[Any] = told) -> None:
                told.append(result)
                if result is None:
                    self.manager.accept(sidecar_of("ABCDE0"))
            self.manager.commit(etrn.Draft("ABCDE0"), [MESSAGE], sidecar_of("ABCDE0"), then)
            report = wait(lambda: self.reports and self.reports.pop(), "its report")
            self.manager.load()                         # it is in the folder, and nobody was told yet
            found = wait(lambda: self.reports and self.reports.pop(), "what was found")
            self.assertEqual([one.id for one in found.found], ["ABCDE0"])
            self.manager.handle(found, self.clock.now)
            self.assertEqual(self.manager.scheduler.messages()[0], 0)
            self.manager.handle([(report[0][0], error)], self.clock.now)
            queued = [id for site in self.manager.scheduler.sites.values() for id in site.entries]
            self.assertEqual((told, queued), ([error], left))
            self.assertEqual(self.manager.ids.coming, set())
            self.manager.scheduler.sites.clear()
            self.spool.remove(["ABCDE0"])

    def test_a_notice_whose_cause_cannot_be_recorded_yet_is_queued_once(self) -> None:
        """The reader of the spool finds it between two attempts."""
        site, entry = self.queue("ABCDE0", recipients=["user@" + DOMAIN, "user@two.example"])

        def notices() -> List[str]:
            sites = self.manager.scheduler.sites
            return [id for name in sites if name.startswith(etrn.NOTICES) for id in sites[name].entries]
        with mock.patch.object(self.spool, "replace_sidecar", side_effect=OSError(errno.ENOSPC, "No space left on device")):
            self.manager.end(site, entry, etrn.EXPIRED, "4.4.7", "too late")
            self.settle()
            self.assertEqual(len(recover_open(self.spool)), 2)
            self.manager.load()
            self.settle()
            self.assertEqual(notices(), [])
        self.manager.tick(self.clock.advance(etrn.RETRY_DISK_S))
        self.settle()
        self.assertEqual((len(notices()), list(site.entries), self.manager.ids.coming), (1, [], set()))

    def test_what_was_learnt_by_a_clock_that_ran_ahead_is_not_known(self) -> None:
        memory, now = self.manager.memory, self.clock.wall
        for ahead, known in cases(self, [(0.0, True), (3600.0, True), (400 * 86400.0, None)]):     # but good is good
            memory.learn("good@x.example", True, now + ahead)
            memory.learn("bad@y.example", False, now + ahead)
            memory.learn_accept_all("z.example", True, now + ahead)
            self.assertEqual((memory.knows("good@x.example", now), memory.is_good("good@x.example", now),
                              memory.knows("bad@y.example", now), memory.knows("any@z.example", now)),
                             (known, True, known and False, known))

    def test_a_flush_does_not_wait_for_what_is_held_or_to_be_collected_meanwhile(self) -> None:
        def hold() -> None:
            self.manager.hold("ABCDE0", True, lambda result: None)

        def hold_all() -> None:
            self.manager.hold(DOMAIN, True, lambda result: None)

        def collect() -> None:
            self.manager.hold(DOMAIN, False, lambda result: None)
            self.manager.reconfigure(config("", "primary = atrn"))
        self.queue("ABCDE0")
        for act, reason in cases(self, [(hold, "held by command"), (hold_all, "held by command"), (collect, "to be collected")]):
            answers = etrn.run_command(self.manager, {"command": "flush", "what": DOMAIN})
            self.assertEqual([next(answers), next(answers)], [{"total": 1, "left": 1}, None])
            act()
            self.clock.advance(etrn.FLUSH_LOOK_S)
            self.manager.tick(self.clock.now)
            last = [one for one in answers if one][-1]
            self.assertEqual((last["deferred"], last["exit"], reason in last["reason"]), (1, etrn.EX_TEMPFAIL, True))
            self.manager.hold("ABCDE0", False, lambda result: None)
            self.manager.hold(DOMAIN, False, lambda result: None)
        self.settle()

    def test_mail_of_our_own_follows_its_route_and_its_hold_outlasts_a_restart(self) -> None:
        smarthost = "[bounces]\nroute = [192.0.2.5]:587"
        self.manager.reconfigure(config("", smarthost))
        id = "ABCDE0"
        self.assertIsNone(store(self.spool, id, kind="notice", sender="", recipients=["a@sender.example"]))
        self.manager.accept(self.spool.read_sidecar(id))
        self.manager.hold(id, True, lambda result: None)
        self.settle()
        self.assertEqual(self.spool.read_sidecar(id)["held"], [etrn.NOTICES])
        for options, name in cases(self, [("", "notice:sender.example"), (smarthost, etrn.NOTICES)]):
            self.manager.reconfigure(config("", options))
            self.manager.tick(self.clock.advance(1))
            self.settle()
            self.assertEqual([(site.name, [entry.state for entry in site.entries.values()])
                              for site in self.manager.scheduler.sites.values() if site.entries], [(name, [etrn.State.HOLD])])
        site = self.manager.scheduler.sites[etrn.NOTICES]
        self.manager.hold(id, False, lambda result: None)
        self.settle()
        site._set(site.entries[id], etrn.State.DELIVERING)
        self.manager.reconfigure(config())
        self.manager.tick(self.clock.advance(1))
        self.settle()
        self.assertEqual(list(site.entries), [id])          # it is being sent
        site.give_back(site.entries[id])
        self.manager.tick(self.clock.advance(1))
        self.settle()
        self.assertEqual((list(site.entries), list(self.manager.scheduler.sites["notice:sender.example"].entries)), ([], [id]))

    def test_who_collects_is_not_cut_off_while_anything_moves(self) -> None:
        site, _ = self.queue("ABCDE0")
        leg, now = mock.Mock(is_sent=True), self.clock.mono
        for moved, flight, is_stalled, cuts in cases(self, [
                (-61, [], False, 1), (-59, [], False, 0), (-61, [leg], False, 0), (-61, [mock.Mock(is_sent=False)], False, 1),
                (-61, [], True, 0)]):
            courier = mock.Mock(spec=etrn.Turnaround, sites=(site,), flight=flight, client=mock.Mock(moved=now + moved))
            self.manager.couriers[courier] = site
            with shorten(UNRECORDED_MAX=0 if is_stalled else 9):
                self.manager.cut_silent([site])
            self.assertEqual(courier.cut.call_count, cuts)
            self.manager.couriers.clear()
        self.settle()

    def test_what_is_known_of_a_site_outlasts_an_older_state_file(self) -> None:
        site, _ = self.queue("ABCDE0")
        site.counters["delivered"] = 5
        self.manager.save_state()
        wait(self.is_saved, "the state")
        state = self.spool.load_state()
        self.assertEqual(state["sites"][DOMAIN].pop("pardoned"), 0.0)
        with mock.patch.object(self.spool, "load_state", lambda name="state.json": state if name == "state.json" else {}):
            other = etrn.Manager(self.manager.cfg, self.spool, self.log, self.reports.append, self.clock.now)
            other.load_state()
        self.assertEqual(other.scheduler.sites[DOMAIN].counters["delivered"], 5)

    def part_with(self, primary: str) -> Tuple[etrn.Site, etrn.Courier, etrn.Inquirer, List[Any]]:
        """A site with connections, whose primary becomes another one.  The last is what the courier was told."""
        site, entry = self.queue("ABCDE0")
        plan, told = self.manager.plan(site), []
        courier, inquirer = etrn.Courier(self.spool, plan, told.append), etrn.Inquirer(plan, told.append)
        self.manager.couriers[courier], self.manager.inquirers[inquirer] = site, site
        site.on_started(self.clock.now)
        with mock.patch.object(etrn.Inquirer, "cut") as cut:
            self.manager.reconfigure(config("", primary))
        self.assertEqual(cut.call_count, 1)
        return site, courier, inquirer, told

    def test_another_primary_gets_what_the_old_one_has_not_begun(self) -> None:
        self.manager.memory.learn("x@" + DOMAIN, False, self.clock.wall)
        site, courier, inquirer, _ = self.part_with("primary = 192.0.2.7")
        self.assertIsNone(self.manager.memory.knows("x@" + DOMAIN, self.clock.wall))
        self.assertIsNone(courier.inbox.get_nowait())
        self.assertTrue(site.wanted(self.clock.now))        # the old one, in its long wait, counts no more
        old = etrn.Hop("old.example", "192.0.2.1", 25)
        for report in cases(self, [etrn.Routed(courier, (old,), ""), etrn.Greeted(courier, old, 7), etrn.Heard(inquirer, old, 7),
                                   etrn.Finished(courier, "old.example has gone", None),
                                   etrn.Unheard(inquirer, "old.example has gone", None)]):
            self.manager.handle(report, self.clock.now)
            self.assertEqual((site.route, site.state, site.size_limit, site.last_error, site.opening, site.open,
                              courier.inbox.empty(), self.manager.callers), ([], etrn.Primary.UNKNOWN, 0, "", 0, 0, True, {}))
        self.assertEqual((self.manager.couriers, self.manager.inquirers), ({}, {}))
        self.settle()

    def test_a_former_primary_that_hangs_holds_nothing_up_but_what_it_has(self) -> None:
        site, first = self.queue("ABCDE0")
        other = self.queue("ABCDE1")[1]
        site.is_proven = True
        courier = etrn.Courier(self.spool, self.manager.plan(site), self.reports.append)
        self.manager.couriers[courier] = site
        site.on_started(self.clock.now)
        courier.is_greeted = True
        site.on_connected(self.clock.now)
        self.manager._feed(courier, site)
        self.assertEqual((site.handed, courier.inbox.get_nowait().id), ({"ABCDE0", "ABCDE1"}, "ABCDE0"))      # type: ignore
        self.manager.reconfigure(config("", "primary = 192.0.2.7"))
        self.assertEqual((list(courier.jobs), courier.inbox.get_nowait(), first.state, other.state, site.handed),
                         (["ABCDE0"], None, etrn.State.DELIVERING, etrn.State.ACTIVE, set()))
        self.clock.advance(etrn.TRIGGER_S)
        self.assertEqual((site.wanted(self.clock.now), site.take(9, self.clock.now)), (True, [other]))
        site.give_back(other)
        self.manager.couriers.clear()
        self.settle()

    def test_another_primary_is_not_believed_at_once(self) -> None:
        site, _ = self.queue("ABCDE0")
        site.since, site.last_heard = self.clock.wall - 1e6, self.clock.mono
        site.refused.update("abc")
        self.assertTrue(site.is_final(self.clock.now, None, False))
        self.manager.reconfigure(config("", "primary = 192.0.2.7"))
        site.on_heard(self.clock.now)
        self.assertEqual((site.is_final(self.clock.now, None, False), site.refused), (False, set()))
        self.settle()

    def test_what_a_former_primary_says_settles_the_message_alone(self) -> None:
        site, courier, inquirer, _ = self.part_with("primary = 192.0.2.7")
        asked: List[Any] = []
        self.manager.questions[site.name, "y@" + DOMAIN] = [lambda *answer: asked.append(answer)]
        self.manager.handle(etrn.Answered(inquirer, "y@" + DOMAIN, "bad", "550 gone"), self.clock.now)
        self.assertEqual((asked, self.manager.memory.knows("y@" + DOMAIN, self.clock.wall)), ([("silent", "550 gone")], None))
        entry, = site.entries.values()
        site._set(entry, etrn.State.DELIVERING)
        courier.jobs[entry.id] = entry
        result = etrn.Result("user@" + DOMAIN, "sent", "2.0.0", "250 ok", "old.example", None)
        self.manager.handle(etrn.Outcome(courier, etrn.Job(entry.id, DOMAIN), (result,), True, entry.received, "x", 0.1),
                            self.clock.now)
        self.settle()
        self.assertEqual((list(site.entries), site.is_proven, site.counters["delivered"]), ([], False, 1))

    def test_a_connection_under_way_to_where_the_primary_was_carries_nothing(self) -> None:
        self.manager.reconfigure(config("", "primary = etrn"))
        site, _ = self.queue("ABCDE0")
        self.manager.move(DOMAIN, "192.0.2.1")
        for is_greeted in cases(self, [False, True]):
            courier = etrn.Courier(self.spool, self.manager.plan(site), self.reports.append)
            self.manager.couriers[courier] = site
            site.on_started(self.clock.now)
            if is_greeted:
                site.on_connected(self.clock.now)
            courier.is_greeted = is_greeted
            with mock.patch.object(etrn.Courier, "cut") as cut:
                self.manager.move(DOMAIN, "192.0.2.%d" % (8 + is_greeted))
                for seconds, cuts in ((etrn.PART_S - 0.1, 0), (0.2, 1)):        # an answer may be on its way
                    self.manager.tick(self.clock.advance(seconds))
                    self.assertEqual(cut.call_count, cuts)
            self.manager.handle(etrn.Greeted(courier, etrn.Hop("192.0.2.1", "192.0.2.1", 25), 0), self.clock.now)
            self.assertEqual((courier.inbox.get_nowait(), courier.inbox.empty(), courier.jobs), (None, True, {}))
            self.assertEqual(site.handed, set())
            self.clock.advance(etrn.TRIGGER_S)
            self.assertTrue(site.wanted(self.clock.now))
            self.manager.handle(etrn.Finished(courier, "lost connection", None), self.clock.now)
            self.assertEqual((site.opening, site.open, site.state), (0, 0, etrn.Primary.UP))
        self.settle()

    def test_the_same_primary_is_remembered(self) -> None:
        self.manager.scheduler.site(DOMAIN, self.clock.now)
        for host, known in cases(self, [("192.0.2.7", None), ("192.0.2.7", False), ("192.0.2.8", None)]):
            self.manager.memory.learn("x@" + DOMAIN, False, self.clock.wall)
            self.manager.reconfigure(config("", "primary = " + host))
            self.assertIs(self.manager.memory.knows("x@" + DOMAIN, self.clock.wall), known)
        self.settle()

    def test_a_flood_of_flushes_walks_the_queue_once_a_second(self) -> None:
        site, entry = self.queue("ABCDE0")
        rounds = []
        for seconds in (0.0, 0.3, 0.3, 0.5, 0.1):
            self.manager.flush_sites([site])
            rounds.append(site.round)
            self.clock.advance(seconds)
            self.manager.tick(self.clock.now)
        self.assertEqual(rounds, [1, 1, 1, 1, 2])
        site.is_proven = True
        self.clock.advance(5)
        self.manager.flush_sites([site])
        self.assertEqual(site.take(1, self.clock.now), [entry])
        self.manager.flush_sites([site])        # one under way has another look, should it come back
        self.assertTrue(entry.again)
        site.defer(entry, self.clock.now, 300)
        self.assertIs(entry.state, etrn.State.ACTIVE)
        site.defer(entry, self.clock.now, 300)
        self.manager.flush_sites([site])        # something waits again: due at once
        self.assertIs(entry.state, etrn.State.ACTIVE)

    def test_states_that_wait_for_the_disk_do_not_pile_up(self) -> None:
        told: List[Any] = []
        for _ in range(10):
            self.manager.save_state()
        self.manager.save_state(told.append)
        self.assertEqual((self.manager.saving, self.manager.is_dirty), (3, False))
        wait(self.is_saved, "all of them")
        self.assertEqual(told, [None])

    def is_saved(self) -> bool:
        self.settle()
        return not self.manager.saving

    def test_a_notice_of_a_delay_is_sent_although_its_message_has_left_meanwhile(self) -> None:
        site, entry = self.queue("ABCDE0")
        with mock.patch.object(self.spool, "replace_sidecar", side_effect=OSError(errno.ENOSPC, "No space left on device")):
            self.manager._tell_delay(site, entry)
            self.settle()
        notice, = [id for id in self.spool.names() if id != "ABCDE0"]
        self.outcome(site, entry, user="sent")
        self.settle()
        self.assertEqual((list(self.spool.names()), self.manager.scheduler.holding(notice)), ([notice], []))
        self.manager.tick(self.clock.advance(etrn.RETRY_DISK_S))
        self.settle()
        self.assertTrue(self.manager.scheduler.holding(notice))

    def test_a_bug_in_one_callback_is_not_its_neighbours(self) -> None:
        told: List[int] = []
        self.manager.handle([(lambda _: 1 // 0, 1), (told.append, 2)], self.clock.now)
        self.manager.questions[DOMAIN, "x"] = [lambda *_: 1 // 0, lambda *_: told.append(3)]
        self.manager._tell_all(DOMAIN, "x", "good", "")
        self.assertEqual(told, [2, 3])
        self.assertEqual(sum("bug: " in line for line in self.log.lines), 2)
        self.log.lines.clear()

    def test_a_flush_during_the_loading_holds_for_what_is_read_later(self) -> None:
        self.manager.is_loading = True
        self.assertEqual(self.finish(etrn.run_command(self.manager, {"command": "flush", "what": DOMAIN}, 0, 1.0))["queued"], 0)
        self.assertEqual(self.manager.early, {DOMAIN})
        self.manager.is_loading = False

    def test_a_disk_that_owes_much_gets_no_connections_and_keeps_no_client(self) -> None:
        site, _ = self.queue("ABCDE0")
        self.manager.may_connect = lambda site: True
        with shorten(UNRECORDED_MAX=1), mock.patch.object(self.manager, "_connect") as connect:
            self.manager.unrecorded.add("ABCDEF")
            answers: List[Any] = []
            self.manager.tick(self.clock.advance(5))
            self.manager.cut_through({"id": "ABCDE0"}, answers.append)
            self.assertEqual((connect.call_count, answers), (0, [None]))
            entry = site.entries["ABCDE0"]
            self.manager.scheduler.sites[DOMAIN].defer(entry, self.clock.now, 3)
            self.manager.tick(self.clock.advance(5))
            self.assertGreater(self.manager.wake(self.clock.now), self.clock.mono)      # it rests
            self.manager.unrecorded.clear()
            self.manager.tick(self.clock.advance(5))
            self.assertEqual(connect.call_count, 1)

    def test_a_message_for_which_an_idle_connection_is_there_opens_none(self) -> None:
        site, entry = self.queue("ABCDE0")
        site.defer(entry, self.clock.now, 0.5)
        site.on_started(self.clock.now)
        site.on_connected(self.clock.now)
        for _ in range(10):
            site.on_taken(self.clock.now, 0.3)
        courier = mock.Mock(jobs={}, is_greeted=True, is_leaving=False, is_former=False)
        self.manager.couriers[courier] = site
        self.manager.may_connect = lambda site: True
        with mock.patch.object(self.manager, "_connect") as connect:
            self.manager.tick(self.clock.advance(1))
        self.assertEqual((list(courier.jobs), connect.call_count), (["ABCDE0"], 0))
        self.manager.couriers.clear()
        site.on_closed(self.clock.now, "")

    def test_a_removal_that_fails_is_not_told_as_done(self) -> None:
        self.queue("ABCDE0")
        with mock.patch.object(self.spool, "remove", side_effect=lambda ids: [OSError(errno.EROFS, "read-only")] * len(ids)):
            self.assertEqual(self.finish(etrn.end_entries(self.manager, DOMAIN, "delete")), {"count": 0, "busy": 1, "exit": 75})
        self.manager.tick(self.clock.advance(etrn.RETRY_DISK_S))
        self.settle()
        self.assertEqual((list(self.spool.names()), self.manager.scheduler.sites[DOMAIN].entries), ([], {}))

    # -- commands that end many messages

    def finish(self, steps: etrn.Answers) -> Dict[str, Any]:
        """The command's last answer."""
        for answer in itertools.islice(steps, 100):
            if answer is not None:
                return answer
            self.settle()
        raise AssertionError("no answer")

    def test_a_long_queue_is_deleted_in_steps_and_counted_right(self) -> None:
        for command, notices in cases(self, [("delete", 0), ("bounce", 5)]):
            for number in range(7):
                site, _ = self.queue("ABCDE%d" % number)
            entries = list(site.entries.values())
            with shorten(END_BATCH=3):
                steps = etrn.end_entries(self.manager, DOMAIN, command)
                self.assertIsNone(next(steps))              # the others' turn, after two messages
                self.settle()
                self.assertEqual(list(site.entries.values()), entries[2:])
                self.assertEqual(self.finish(etrn.end_entries(self.manager, entries[3].id, "delete"))["count"], 1)
                site.on_started(self.clock.now)
                site.on_connected(self.clock.now)
                self.assertEqual(site.take(1, self.clock.now), [entries[2]])        # being sent
                self.assertEqual(self.finish(steps), {"count": 5, "busy": 1, "exit": 75})
            self.assertEqual((list(site.entries.values()), self.manager.watches), ([entries[2]], []))
            mail = [one for one in map(self.spool.read_sidecar, self.spool.names()) if one["kind"] != "mail"]
            self.assertEqual(len(mail), notices)
            site.on_closed(self.clock.now, "")
            self.spool.remove(list(self.spool.names()))
            self.manager.scheduler.sites.clear()

    def test_others_have_their_turn_after_each_step_of_a_deletion(self) -> None:
        for number in range(6):
            self.queue("ABCDE%d" % number)
        for batch, turns in cases(self, [(1, 6), (2, 3), (6, 1), (7, 0)]):
            ended: List[str] = []
            with shorten(END_BATCH=batch), mock.patch.object(
                    self.manager, "end", side_effect=lambda site, entry, kind, ended=ended: ended.append(entry.id)):
                steps = etrn.end_entries(self.manager, DOMAIN, "delete")
                counts = [len(ended) for answer in itertools.takewhile(lambda _: len(ended) < 6, steps)]    # noqa: B023
                steps.close()           # type: ignore[attr-defined]
            self.assertEqual(counts, [number * batch - 1 for number in range(1, turns + 1)])
            self.assertEqual(self.manager.watches, [])

    def test_what_the_disk_does_not_take_is_not_counted_as_ended(self) -> None:
        for number in range(3):
            site, _ = self.queue("ABCDE%d" % number)
        with mock.patch.object(self.spool, "_write", side_effect=OSError(errno.ENOSPC, "No space left on device")):
            steps = etrn.end_entries(self.manager, DOMAIN, "bounce")
            self.assertIsNone(next(steps))
            self.manager._end_watches(site, "Connection refused")       # says nothing of what needs no primary
            self.assertEqual(self.finish(steps), {"count": 0, "busy": 3, "exit": 75})
        self.assertEqual((len(site.entries), self.manager.unrecorded), (3, set(site.entries)))
        self.manager.tick(self.clock.advance(etrn.RETRY_DISK_S))
        self.settle()
        self.assertEqual((site.entries, self.manager.unrecorded), ({}, set()))

    def test_no_more_is_given_out_than_the_disk_may_owe(self) -> None:
        for number in range(6):
            site, entry = self.queue("ABCDE%d" % number)
        site.on_started(self.clock.now)
        site.on_connected(self.clock.now)
        site.on_taken(self.clock.now)
        courier = mock.Mock(is_greeted=True, is_leaving=False, jobs={}, is_former=False)
        refusing = mock.patch.object(self.spool, "remove", side_effect=lambda ids: [OSError(errno.EROFS, "read-only")] * len(ids))
        with refusing, shorten(UNRECORDED_MAX=2, JOBS_PER_CONNECTION=1, JOBS_REFILL=1):
            for _ in range(6):
                courier.jobs.clear()
                self.manager._feed(courier, site)
                for id in list(courier.jobs):
                    self.manager._remove(id)
                self.settle()
        self.assertEqual((len(self.manager.unrecorded), site.count[etrn.State.DELIVERING]), (2, 2))
        self.manager.tick(self.clock.advance(etrn.RETRY_DISK_S))
        self.settle()
        self.assertEqual(self.manager.unrecorded, set())
        site.on_closed(self.clock.now, "")

    # -- pairs that come and go

    def look(self) -> None:
        """As at SIGHUP."""
        self.manager.load()
        self.settle()

    def copied(self, id: str, *parts: Tuple[str, float]) -> Iterator[None]:
        """Copy a pair from elsewhere, by parts: (kind, share of it that is there)."""
        other = opened(self.fresh())
        self.assertIsNone(store(other, id, MESSAGE * 100))
        other.close()
        for kind, share in parts:
            with open(os.path.join(other.path, id + kind), "rb") as source:
                data = source.read()
            path = os.path.join(self.path, id + kind)
            with open(path, "wb") as file:
                file.write(data[:int(len(data) * share)])
            os.utime(path, (5.0, 5.0))          # cp -p, rsync -t
            yield

    def test_a_pair_that_is_being_copied_is_waited_for(self) -> None:
        self.look()
        for number, parts in enumerate(cases(self, [
                [(".eml", 0.5), (".eml", 1), (".json", 0.5), (".json", 1)],
                [(".json", 0), (".json", 1), (".eml", 0), (".eml", 1)],
                [(".json", 1), (".eml", 0.9), (".eml", 1)], [(".eml", 1), (".json", 1)]])):
            id = "ABCD0%d" % number
            for _ in self.copied(id, *parts):
                self.assertFalse(self.manager.scheduler.holding(id))
                self.look()
            self.assertTrue(self.manager.scheduler.holding(id))
        self.assertEqual(os.listdir(os.path.join(self.path, "corrupt")), [])

    def test_half_a_pair_is_looked_at_again_and_set_aside_when_nothing_comes(self) -> None:
        self.look()
        for number, (parts, comes) in enumerate(cases(self, [
                ([(".json", 1), (".eml", 1)], True), ([(".json", 1)], False), ([(".eml", 1)], False)])):
            id = "ABCD0%d" % number
            copying = self.copied(id, *parts)
            next(copying)
            self.look()
            for _ in copying:
                pass
            with shorten(COPY_S=0.0 if not comes else 5.0):
                self.manager.tick(self.clock.advance(5.0))
                self.settle()
            self.assertEqual(bool(self.manager.scheduler.holding(id)), comes)
            self.assertEqual(len(os.listdir(os.path.join(self.path, "corrupt"))), number)

    def test_what_a_disk_does_not_give_is_asked_for_again_ever_more_rarely(self) -> None:
        self.assertIsNone(store(self.spool, "ABCDE0"))
        self.assertIsNone(store(self.spool, "ABCDE1"))
        real = self.spool.read_sidecar

        def failing(id: str) -> Dict[str, Any]:
            if id == "ABCDE0":
                raise OSError(errno.EIO, "I/O error")
            return real(id)
        with mock.patch.object(self.spool, "read_sidecar", failing):
            self.look()
            self.assertEqual(list(self.manager.scheduler.sites[DOMAIN].entries), ["ABCDE1"])
            self.assertEqual(self.manager.load_error, "")       # one sector is not the queue: ETRN goes on
            for _ in range(12):
                self.manager.tick(self.clock.advance(self.manager.retries[0][0] - self.clock.mono))
                self.settle()
        tries = [line for line in self.log.lines if "could not be read whole: ABCDE0: I/O error; trying again" in line]
        self.assertEqual(len(tries), 13)
        self.assertGreater(self.manager.retries[0][0] - self.clock.mono, 200)
        self.manager.tick(self.clock.advance(etrn.RETRY_READ_S))
        self.settle()
        self.assertEqual(sorted(self.manager.scheduler.sites[DOMAIN].entries), ["ABCDE0", "ABCDE1"])

    def test_a_pair_that_cannot_be_set_aside_keeps_no_other_from_being_read(self) -> None:
        for number in range(5):
            self.assertIsNone(store(self.spool, "ABCDE%d" % number))
        for name in ("ABCDE1.eml", "ABCDE3.json"):
            with open(os.path.join(self.path, name), "ab") as file:
                file.write(b"x")
        with mock.patch.object(self.spool, "set_aside", side_effect=OSError(errno.ENOSPC, "No space left on device")):
            self.look()
            self.assertEqual(sorted(self.manager.scheduler.sites[DOMAIN].entries), ["ABCDE0", "ABCDE2", "ABCDE4"])
            self.assertEqual(self.manager.load_error, "")
            self.assertRegex("\n".join(self.log.lines), r"not be read whole: ABCDE[13]: .*: No space left on device; trying")
        with shorten(COPY_S=0.0):
            self.manager.tick(self.clock.advance(self.manager.retries[0][0] - self.clock.mono))
            self.settle()
        self.assertEqual(sorted(os.listdir(os.path.join(self.path, "corrupt"))),
                         ["ABCDE1.eml", "ABCDE1.json", "ABCDE3.eml", "ABCDE3.json"])

    def test_what_could_not_be_set_aside_is_set_aside_later(self) -> None:
        site, entry = self.queue("ABCDE0")
        with mock.patch.object(self.spool, "set_aside", side_effect=OSError(errno.ENOSPC, "No space left on device")):
            self.manager._on_fault(site, entry, etrn.Corrupt("odd"))
            self.settle()
        self.assertEqual(spool_files(self.path), ["ABCDE0.eml", "ABCDE0.json"])
        self.manager.tick(self.clock.advance(etrn.RETRY_DISK_S))
        self.settle()
        self.assertEqual(spool_files(self.path), [])
        self.assertEqual(len(os.listdir(os.path.join(self.path, "corrupt"))), 2)

    def test_a_pair_removed_by_somebody_leaves_the_queue_too(self) -> None:
        for gone, outcome in cases(self, itertools.product(
                [(".eml",), (".json",), (".eml", ".json")], [{"user": "sent"}, {"user": "deferred"}])):
            site, entry = self.queue("ABCDE0")
            for kind in gone:
                os.unlink(os.path.join(self.path, "ABCDE0" + kind))
            self.outcome(site, entry, **outcome)
            self.settle()
            if site.entries:                    # deferred, and its sidecar is there: found at the next attempt
                self.assertEqual((gone, entry.state), ((".eml",), etrn.State.DEFERRED))
                self.manager._on_fault(site, entry, etrn.Corrupt("the body is gone"))
                self.settle()
            self.assertEqual((site.entries, spool_files(self.path)), ({}, []))
        self.assertEqual([line for line in self.log.lines if "bug" in line], [])


# == 10. DELIVERY ==============================================================
# One connection to a scripted primary, and what it reports of each recipient.

ENDLESS = b"250-and another thing\r\n" * 5000
OVERLONG = b"250 " + b"x" * 200000
GARBAGE = [b"hello\r\n", b"-1 x\r\n", b"850 x\r\n", b"25 x\r\n", b"250x\r\n", b"250-a\r\n550 b\r\n", b"\r\n", b"\x00\xff\r\n",
           b"199 x\r\n", b"600 x\r\n"]


def slowed(real: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def late(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return real(*args, **kwargs)
    return late


class Delivery(Folder):
    def setUp(self) -> None:
        super().setUp()
        self.spool = opened(os.path.join(self.folder, "spool"))
        self.addCleanup(self.spool.close)
        self.serial = 0xABC000

    def put(self, data: bytes = MESSAGE, **values: Any) -> str:
        self.serial += 1
        id = "%X" % self.serial
        self.assertIsNone(store(self.spool, id, data, **values))
        return id

    def primary(self, **script: Any) -> Primary:
        primary = Primary(**script)
        self.addCleanup(primary.__exit__)
        return primary.start()

    def deliver(self, primary: Primary, *ids: str, **options: str) -> Tuple[Dict[str, List[etrn.Result]], str]:
        """Results for each message, in the order they were reported, and how the connection ended."""
        lines = ["%s = %s" % item for item in {"primary": primary.address, "tls": "none", **options}.items()]
        cfg = config("", "\n".join(lines)).domain(DOMAIN)
        reports: List[Any] = []
        courier = self.courier = etrn.Courier(self.spool, make_plan(cfg, cfg.primary), reports.append)
        for id in ids:
            courier.jobs[id] = mock.sentinel.entry
            courier.inbox.put(etrn.Job(id, DOMAIN))
        courier.inbox.put(None)
        courier.start()
        courier.join(DEADLINE_S)
        self.assertFalse(courier.is_alive())
        last = reports[-1]
        self.assertIsInstance(last, etrn.Finished)
        self.assertIsNone(last.bug, last.bug)
        self.outcomes = {one.job.id: one for one in reports if isinstance(one, etrn.Outcome)}
        return {id: list(one.results) for id, one in self.outcomes.items()}, last.error

    def kinds(self, results: Iterable[etrn.Result]) -> List[str]:
        return ["%s %s" % (one.kind, one.status) for one in results]

    def every_way(self, **script: Any) -> Iterator[Primary]:
        """A primary with PIPELINING, one without, and, unless DATA is scripted, one with CHUNKING."""
        for extensions in (["PIPELINING", "8BITMIME", "DSN", "SIZE 1000000"], ["8BITMIME", "SIZE"],
                           ["PIPELINING", "CHUNKING", "DSN", "8BITMIME"])[:2 if "DATA" in script else 3]:
            primary = self.primary(**script)
            primary.extensions = extensions
            yield primary
            primary.stop()

    def test_mail_arrives_octet_for_octet(self) -> None:
        for body in cases(self, [MESSAGE, b"", b".\r\n", b"..\r\n.\r\n\r\n.x\r\n", b"\r\n", b"caf\xe9 \xff\r\n",
                                 b"x" * 5000 + b"\r\n"]):
            for primary in self.every_way():
                results, error = self.deliver(primary, self.put(body))
                self.assertEqual((self.kinds(*results.values()), error), (["sent 2.0.0"], ""))
                self.assertEqual(primary.messages, [("a@sender.example", ["user@" + DOMAIN], body)])

    def test_dots_are_stuffed_wherever_a_block_ends(self) -> None:
        chance = random.Random(3)
        primary = self.primary()
        for size in cases(self, [1, 2, 3, 7]):
            body = b"".join(chance.choice([b"\r\n", b".", b"a"]) for _ in range(400)) + b"\r\n"
            with mock.patch.object(etrn, "BLOCK_OCTETS", size):
                results, _ = self.deliver(primary, self.put(body))
            self.assertEqual(self.kinds(*results.values()), ["sent 2.0.0"])
            self.assertEqual(primary.messages.pop()[2], body)

    def test_a_message_of_megabytes_is_sent_in_blocks(self) -> None:
        body = bytes(range(32, 127)) * 30 + b"\r\n"
        primary = self.primary()
        primary.extensions = ["PIPELINING"]
        results, _ = self.deliver(primary, self.put(body * 1000))
        self.assertEqual(self.kinds(*results.values()), ["sent 2.0.0"])
        self.assertEqual(primary.messages[0][2], body * 1000)

    def test_verdicts_are_the_primarys_own(self) -> None:
        for script, expected in cases(self, [
                ({"MAIL": "451 4.3.0 later"}, "deferred 4.3.0"), ({"MAIL": "550 5.7.1 not you"}, "refused 5.7.1"),
                ({"MAIL": "552 too big"}, "refused 5.0.0"), ({"RCPT": "450 4.2.0 greylisted"}, "deferred 4.2.0"),
                ({"RCPT": "550-5.1.1 no\n550 5.1.1 such user"}, "refused 5.1.1"), ({"RCPT": "251 will forward"}, "sent 2.0.0"),
                ({"RCPT": "552 too many"}, "deferred 4.5.3"), ({"RCPT": "552 5.5.3 too many"}, "deferred 4.5.3"),
                ({"RCPT": "552 5.2.2 full"}, "refused 5.2.2"), ({"DATA": "451 4.3.0 later"}, "deferred 4.3.0"),
                ({"DATA": "554 5.7.1 no"}, "refused 5.7.1"),
                ({".": "452 4.3.1 full"}, "deferred 4.3.1"), ({".": "550 5.7.1 spam"}, "refused 5.7.1"),
                ({".": "550 2.0.0 odd"}, "refused 5.0.0"),
                ({"EHLO": "502 what?"}, "sent 2.0.0"), ({"QUIT": CUT}, "sent 2.0.0"), ({"RSET": CUT}, "sent 2.0.0")]):
            for primary in self.every_way(**script):
                id = self.put()
                results, _ = self.deliver(primary, id)
                self.assertEqual([one[:len(expected)] for one in self.kinds(results[id])], [expected])
                self.assertEqual(len(primary.messages), expected == "sent 2.0.0")

    def test_only_a_reply_that_fits_its_command_counts(self) -> None:
        for stage, reply in cases(self, [
                ("MAIL", "354 go on"), ("RCPT", "354 go on"), ("DATA", "250 taken already"), ("DATA", "220 hello"),
                (".", "354 go on"),
                ("MAIL", "399 x"), (".", "334 x")]):
            for primary in self.every_way(**{stage: reply}):
                id = self.put()
                results, _ = self.deliver(primary, id)
                self.assertEqual([one.kind for one in results[id]], ["deferred"])
                self.assertEqual(primary.messages, [])

    def test_a_primary_that_does_not_greet_is_out_of_reach_and_nothing_was_tried(self) -> None:
        table = [{"greeting": said} for said in ["554 5.7.1 go away", "421 busy", "450 later", "250 what", CUT, ENDLESS, OVERLONG,
                                                 *GARBAGE]]
        table += [{"EHLO": said} for said in [CUT, ENDLESS, OVERLONG, "421 busy", *GARBAGE]]
        table += [{"EHLO": "550 no", "HELO": said} for said in ["550 no", "421 busy", "450 later", CUT]]
        for script in cases(self, table):
            primary = self.primary(**script)
            results, error = self.deliver(primary, self.put())
            self.assertEqual((results, bool(error)), ({}, True))
            self.assertLess(len(error), 1000)
            self.assertTrue(error.isprintable(), error)
            primary.stop()

    def test_a_primary_that_breaks_off_or_babbles_defers_the_mail(self) -> None:
        broken = [CUT, ENDLESS.replace(b"250", b"550"), OVERLONG, "421 4.3.2 shutting down", *GARBAGE]
        for stage, said in cases(self, itertools.product(("MAIL", "RCPT", "DATA", "."), broken)):
            if stage == "DATA" and said is not CUT and isinstance(said, bytes):
                said = said.replace(b"250", b"354")
            for primary in self.every_way(**{stage: said}):
                id = self.put()
                results, error = self.deliver(primary, id)
                self.assertEqual([one.kind for one in results[id]], ["deferred"])
                self.assertTrue(error)
                self.assertTrue(all(one.response.isprintable() and len(one.response) < 1000 for one in results[id]))

    FAULTS = {"4xx": "451 4.3.0 later", "5xx": "554 5.7.1 no", "drop": CUT, "hang": HANG, "garbage": b"hello\r\n",
              "over-long": OVERLONG, "endless": ENDLESS, "mismatch": b"250-a\r\n550 b\r\n", "421": "421 4.3.2 closing"}
    # stage: what becomes of the message at each fault, and with a reply of the wrong class; "." alone may make a second copy
    OUTCOMES = [
        ("greeting", "354 go on", {"": "untried"}),
        ("EHLO", "354 go on", {"": "untried", "5xx": "sent"}),                              # HELO will do
        ("STARTTLS", "250 ok", {"": "sent", "421": "untried"}),                             # tls = may: in the clear
        ("MAIL", "354 go on", {"": "deferred", "5xx": "refused"}),
        ("RCPT", "354 go on", {"": "deferred", "5xx": "refused"}),
        ("DATA", "250 ok", {"": "deferred", "5xx": "refused"}),
        (".", "354 go on", {"": "deferred", "5xx": "refused"}),
        ("RSET", "354 go on", {"": "refused"}),                                             # RCPT was; RSET changes nothing
        ("QUIT", "354 go on", {"": "sent"})]

    def test_every_fault_at_every_stage_has_its_outcome_and_no_message_is_lost_or_doubled(self) -> None:
        deadlines = {"greeting": {"CONNECT_S": 0.1}, "DATA": {"DATA_S": 0.1}, ".": {"END_OF_DATA_S": 0.1},
                     "QUIT": {"QUIT_S": 0.1}}
        for stage, wrong, outcomes in cases(self, self.OUTCOMES):
            for fault, said in {**self.FAULTS, "wrong class": wrong}.items():
                for extensions in (["PIPELINING", "SIZE 1000000"], ["SIZE"]):
                    self.row = (stage, fault, extensions[0])
                    primary = self.primary(**{stage: said})
                    primary.extensions = extensions + ["STARTTLS"] * (stage == "STARTTLS")
                    if stage == "RSET":
                        primary.script["RCPT"] = ["550 5.1.1 no", "250 ok"]
                    ids = [self.put(), self.put()]
                    with shorten(**(deadlines.get(stage, {"COMMAND_S": 0.3}) if fault == "hang" else {"QUIT_S": 2.0})):
                        results, error = self.deliver(primary, *ids, tls="may" if stage == "STARTTLS" else "none")
                    kinds = [[one.kind for one in results.get(id, [])] for id in ids]
                    expected = outcomes.get(fault, outcomes[""])
                    self.assertEqual(kinds[0], [] if expected == "untried" else [expected])
                    if expected == "untried":
                        self.assertTrue(error)
                    self.assertTrue(error.isprintable() and len(error) < 1000)
                    reached = primary.uses["."]
                    self.assertGreaterEqual(reached, len(primary.messages))
                    left = [id for id, its in zip(ids, kinds) if its in ([], ["deferred"])]
                    primary.script.clear()
                    again, error = self.deliver(primary, *left)
                    self.assertEqual(([one.kind for id in left for one in again[id]], error), (["sent"] * len(left), ""))
                    copies = primary.uses["."]
                    if stage == ".":        # whether it was taken nobody knows; answered, it was not
                        self.assertEqual(copies - len(left), 2 if expected == "refused" or fault in ("4xx", "wrong class") else 1)
                    else:
                        self.assertEqual(copies, len(primary.messages))
                        self.assertEqual(len(primary.messages), 2 - kinds.count(["refused"]))
                    primary.__exit__()

    def test_a_smarthost_that_refuses_the_password_is_named_with_its_words(self) -> None:
        cfg = config("", "primary = mail.example").domain(DOMAIN)
        courier = etrn.Courier(self.spool, make_plan(cfg, cfg.primary), lambda report: None)
        courier.client = mock.Mock(_host="smart.example")
        for error, text in cases(self, [(smtplib.SMTPAuthenticationError(535, b"5.7.8 bad creds"), "535 5.7.8 bad creds"),
                                        (smtplib.SMTPNotSupportedError("no AUTH"), "no AUTH")]):
            courier.client.login.side_effect = error
            with self.assertRaises(etrn.PeerError) as caught:
                courier._log_in("u", "p")
            self.assertEqual(str(caught.exception), "AUTH at smart.example failed: " + text)

    def test_chunking_alone_is_used_step_by_step(self) -> None:
        primary = self.primary(RCPT=["250 ok", "550 5.1.1 no", "250 ok"], **{".": ["250 ok", "452 4.3.1 full", "250 ok"]})
        primary.extensions = ["CHUNKING", "SIZE"]
        ids = [self.put() for _ in range(4)]
        results, error = self.deliver(primary, *ids)
        self.assertEqual(([one.kind for id in ids for one in results[id]], error), (["sent", "refused", "deferred", "sent"], ""))
        verbs = [line.split()[0] for line in primary.log]
        self.assertEqual((verbs.count("BDAT"), verbs.count("DATA"), verbs.count("RSET")), (3, 0, 4))
        self.assertEqual([data for _, _, data in primary.messages], [MESSAGE] * 2)

    MANY = ["u%d@%s" % (number, DOMAIN) for number in range(250)]      # three transactions

    def test_a_message_of_several_transactions_that_breaks_off_is_answered_once_and_whole(self) -> None:
        leave = b"250 2.0.0 taken\r\n421 4.7.0 enough\r\n"      # and closes: _say() looks at the beginning only
        for extensions, script, kinds in cases(self, [
                (["SIZE"], {"DATA": "421 4.3.2 no"}, {"deferred": 250}),
                (["PIPELINING"], {"DATA": "421 4.3.2 no"}, {"deferred": 250}),
                (["PIPELINING", "CHUNKING"], {".": "421 4.3.2 no"}, {"deferred": 250}),
                (["PIPELINING"], {"RCPT": "550 5.1.1 no", "RSET": CUT}, {"refused": 100, "deferred": 150}),
                (["SIZE"], {"RCPT": ["250 ok"] * 100 + ["550 5.1.1 no"] * 100, "RSET": "421 4.3.2 no"},
                 {"sent": 100, "refused": 100, "deferred": 50}),
                (["SIZE"], {"DATA": ["354 go on", "421 4.3.2 no"]}, {"sent": 100, "deferred": 150}),
                (["SIZE"], {".": leave, "MAIL": ["250 ok", CUT]}, {"sent": 100, "deferred": 150}),
                (["PIPELINING", "CHUNKING"], {".": leave, "MAIL": ["250 ok", CUT]}, {"sent": 100, "deferred": 150})]):
            primary = self.primary(**script)
            primary.extensions = extensions
            many, other = self.put(recipients=self.MANY), self.put()
            results, error = self.deliver(primary, many, other)
            self.assertEqual(collections.Counter(one.kind for one in results[many]), kinds)
            self.assertEqual(bool(error), script.get(".") is not leave)
            self.assertEqual(len({one.address for one in results[many]}), 250)
            self.assertEqual(results.get(other, []), [])        # untried
            primary.stop()

    def test_what_comes_behind_a_verdict_does_not_undo_it(self) -> None:
        """A peer that closes after each message, or has no RSET, has taken them all the same."""
        for extensions, said, kinds, error in cases(self, [
                (["PIPELINING", "CHUNKING"], CUT, ["sent"], ""), (["PIPELINING", "CHUNKING"], "421 4.7.0 enough", ["sent"], ""),
                (["CHUNKING"], CUT, ["sent"], ""), (["CHUNKING"], "421 4.7.0 enough", ["sent"], ""),
                (["CHUNKING"], "500 5.5.2 what?", ["sent"], ""),
                (["PIPELINING", "CHUNKING"], "500 5.5.2 what?", ["deferred"], "answers RSET with 500")]):
            primary = self.primary(RSET=said)
            primary.extensions = extensions
            ids = [self.put(), self.put()]
            results, ended = self.deliver(primary, *ids)
            self.assertEqual([one.kind for one in results[ids[0]]], kinds)
            self.assertIn(error, ended)
            self.assertEqual(bool(ended), bool(error))
            self.assertEqual(results.get(ids[1], []), [])       # untried
            self.assertEqual(self.courier.is_out_of_step, bool(error))
            primary.stop()

    def test_a_connection_that_ends_before_any_transaction_is_a_failure(self) -> None:
        for bye in cases(self, ["421 4.7.0 not today", ""]):
            primary = self.primary(EHLO=b"250 primary.example\r\n" + bye.encode())
            primary.on_hello = lambda sock: sock.shutdown(socket.SHUT_RDWR)
            with mock.patch.object(etrn.Courier, "_next_leg", slowed(etrn.Courier._next_leg, 0.1)):
                results, error = self.deliver(primary, self.put())
            self.assertEqual([list(one) for one in results.values()], [[]])
            self.assertIn("ended the connection" + (": " + bye if bye else ""), error)
            primary.stop()

    def test_a_reply_too_many_makes_no_message_delivered(self) -> None:
        """Each verdict would be that of another command."""
        primary = self.primary(**{".": ["250 2.0.0 taken", b"250 2.0.0 taken\r\n250 2.0.0 again\r\n", "452 4.3.1 full"]})
        primary.extensions = ["PIPELINING", "CHUNKING"]
        ids = [self.put() for _ in range(4)]
        results, error = self.deliver(primary, *ids)
        self.assertEqual([[one.kind for one in results[id]] for id in ids], [["sent"], ["sent"], ["deferred"], ["deferred"]])
        self.assertRegex(error, "answers RSET with 452|not asked for")
        for extensions in cases(self, [["PIPELINING", "CHUNKING"], ["CHUNKING"]]):
            primary = self.primary(RCPT=b"250 ok\r\n250 ok again\r\n", **{".": "452 4.3.1 full"})
            primary.on_data = slowed(lambda sock, data: None, 0.2)
            primary.extensions = extensions
            results, error = self.deliver(primary, self.put())
            self.assertEqual([one.kind for one in [*results.values()][0]], ["deferred"])
            self.assertRegex(error, "answers RSET with 452|not asked for")
        for extensions in cases(self, [["PIPELINING"], ["SIZE"]]):
            primary = self.primary(DATA=b"354 go on\r\n250 2.0.0 taken\r\n")
            primary.extensions = extensions
            results, error = self.deliver(primary, self.put())
            self.assertEqual([one.kind for one in [*results.values()][0]], ["deferred"])
            self.assertIn("says what it was not asked for: 250 2.0.0 taken", error)
            self.assertEqual(primary.messages, [])

    def test_what_is_offered_after_xclient_is_what_counts(self) -> None:
        primary = self.primary(XCLIENT="220 primary.example")
        offers = [["PIPELINING", "CHUNKING", "XCLIENT ADDR"], ["SIZE"]]
        primary.script["EHLO"] = lambda _: "250-primary.example\n" + "\n".join(
            "250%s%s" % (" " if one == last else "-", one) for its in [offers.pop(0)] for last in [its[-1]] for one in its)
        body = b"MAIL FROM:<forged@bank.example>\r\nRCPT TO:<victim@%s>\r\n" % DOMAIN.encode()
        results, _ = self.deliver(primary, self.put(body), xclient="yes")
        self.assertEqual(self.kinds(*results.values()), ["sent 2.0.0"])
        self.assertEqual([message[0] for message in primary.messages], ["a@sender.example"])

    def test_a_primary_that_is_not_there_costs_nobody_an_attempt(self) -> None:
        with Primary() as primary:
            results, error = self.deliver(primary, self.put())
            self.assertEqual(results, {})
            self.assertIn("Connection refused", error)

    def test_a_primary_that_hangs_is_left_at_its_deadline(self) -> None:
        quick = dict.fromkeys(("CONNECT_S", "COMMAND_S", "DATA_S", "END_OF_DATA_S"), 0.4)
        for stage in cases(self, ["greeting", "EHLO", "MAIL", "RCPT", "DATA", "."]):
            for primary in self.every_way(**{stage: HANG}):
                id = self.put()
                with shorten(**quick):
                    results, error = self.deliver(primary, id)
                self.assertIn("timed out", error)
                self.assertEqual([one.kind for one in results.get(id, [])], [] if stage in ("greeting", "EHLO") else ["deferred"])

    def test_a_reply_that_drips_is_left_at_its_deadline(self) -> None:
        primary = self.primary()
        ended = threading.Event()
        self.addCleanup(ended.set)

        def drip(_: str) -> object:
            sock = primary.clients[-1]
            while not ended.wait(0.02):
                sock.sendall(b"250-")
            return CUT
        primary.script["EHLO"] = drip
        with shorten(COMMAND_S=0.3):
            results, error = self.deliver(primary, self.put())
        self.assertEqual(results, {})
        self.assertIn("timed out", error)

    def test_each_recipient_has_its_own_verdict(self) -> None:
        said = {"good": "250 2.1.5 ok", "bad": "550 5.1.1 no", "later": "450 4.2.1 full"}
        for primary in self.every_way(RCPT=lambda argument: said[re.search("<([a-z]+)", argument).group(1)]):
            id = self.put(recipients=["%s@%s" % (name, DOMAIN) for name in ("bad", "good", "later")])
            results, _ = self.deliver(primary, id)
            self.assertEqual({one.address.partition("@")[0]: one.kind for one in results[id]},
                             {"good": "sent", "bad": "refused", "later": "deferred"})
            self.assertEqual(primary.messages, [("a@sender.example", ["good@" + DOMAIN], MESSAGE)])

    def test_a_primary_that_takes_data_without_recipients_gets_none(self) -> None:
        primary = self.primary(RCPT="550 5.1.1 no")
        ids = [self.put(), self.put()]
        results, error = self.deliver(primary, *ids)
        self.assertEqual((self.kinds(results[ids[0]] + results[ids[1]]), error, primary.messages),
                         (["refused 5.1.1"] * 2, "", []))

    def test_many_recipients_go_in_several_transactions(self) -> None:
        people = ["u%d@%s" % (number, DOMAIN) for number in range(250)]
        for primary in self.every_way():
            id = self.put(recipients=people)
            results, _ = self.deliver(primary, id)
            self.assertEqual(sorted(one.address for one in results[id] if one.kind == "sent"), sorted(people))
            self.assertEqual(sorted(itertools.chain(*(one[1] for one in primary.messages))), sorted(people))
            self.assertTrue(all(len(one[1]) <= 100 for one in primary.messages))

    def test_only_recipients_still_queued_are_sent_to(self) -> None:
        id = self.put(recipients=["a@" + DOMAIN, "b@" + DOMAIN, "c@other.example"])
        self.spool.update(id, lambda sidecar: sidecar["recipients"][0].update(state=etrn.DELIVERED))
        primary = self.primary()
        self.deliver(primary, id)
        self.assertEqual([one[1] for one in primary.messages], [["b@" + DOMAIN]])
        self.assertFalse(self.outcomes[id].is_whole)

    def test_many_messages_go_over_one_connection(self) -> None:
        for primary in self.every_way(**{".": ["250 ok", "550 5.7.1 spam", "451 later", "250 ok"]}):
            ids = [self.put(b"Subject: %d\r\n\r\n" % number) for number in range(5)]
            results, error = self.deliver(primary, *ids)
            self.assertEqual([results[id][0].kind for id in ids], ["sent", "refused", "deferred", "sent", "sent"])
            self.assertEqual((error, sum(line.upper().startswith("EHLO") for line in primary.log)), ("", 1))
            self.assertEqual([one[2] for one in primary.messages], [b"Subject: %d\r\n\r\n" % number for number in (0, 3, 4)])

    def test_what_was_not_begun_when_the_connection_broke_goes_back_untried(self) -> None:
        for primary in self.every_way(**{".": ["250 ok", CUT]}):
            ids = [self.put() for _ in range(4)]
            results, error = self.deliver(primary, *ids)
            self.assertTrue(error)
            in_doubt = [["deferred"]] if "CHUNKING" in primary.extensions else [[]]     # their data was sent, too
            self.assertEqual([[one.kind for one in results.get(id, [])] for id in ids], [["sent"], ["deferred"]] + 2 * in_doubt)

    def test_with_chunking_a_window_of_messages_is_in_flight(self) -> None:
        behind = []

        def late(argument: str) -> str:
            if len(primary.messages) == 1:      # the second is answered when others have come behind it
                behind.append(primary.lines.peek(1)[:4])
            return "250 ok"
        primary = self.primary(**{".": late})
        primary.extensions = ["PIPELINING", "CHUNKING"]
        ids = [self.put(b"Subject: %d\r\n\r\n.\r\n.x\r\n" % number) for number in range(40)]
        with shorten(CHUNK_MESSAGES=3):
            results, error = self.deliver(primary, *ids)
        self.assertEqual((error, [results[id][0].kind for id in ids]), ("", ["sent"] * 40))
        self.assertEqual(behind, [b"RSET"])
        self.assertEqual([one[2] for one in primary.messages],
                         [b"Subject: %d\r\n\r\n.\r\n.x\r\n" % number for number in range(40)])

    def test_a_refusal_within_the_window_is_of_its_message_alone(self) -> None:
        primary = self.primary(MAIL=["250 ok", "250 ok", "452 4.3.1 full", "250 ok"],
                               RCPT=["250 ok", "550 5.1.1 no such user", "250 ok", "250 ok"])
        primary.extensions = ["PIPELINING", "CHUNKING", "SIZE 1000000"]
        ids = [self.put(b"MAIL FROM:<evil@x.example>\r\n%d\r\n" % number) for number in range(6)]
        results, error = self.deliver(primary, *ids)
        self.assertEqual((error, [self.kinds(results[id])[0].split()[0] for id in ids]),
                         ("", ["sent", "refused", "deferred", "sent", "sent", "sent"]))
        self.assertEqual([one[2] for one in primary.messages],
                         [b"MAIL FROM:<evil@x.example>\r\n%d\r\n" % number for number in (0, 3, 4, 5)])

    def test_the_window_is_small(self) -> None:
        """What is in doubt when a connection breaks is bounded, however much waits."""
        primary = self.primary(**{".": ["250 ok", CUT]})
        primary.extensions = ["PIPELINING", "CHUNKING"]
        ids = [self.put() for _ in range(30)]
        results, _ = self.deliver(primary, *ids)
        self.assertEqual([one[0].kind for one in results.values() if one], ["sent"] + ["deferred"] * etrn.CHUNK_MESSAGES)
        for size, most in cases(self, [(200, 30), (100000, 3), (300000, 1)]):
            other = self.primary(**{".": ["250 ok", CUT]})
            other.extensions = ["PIPELINING", "CHUNKING"]
            with shorten(CHUNK_MESSAGES=50):
                results, _ = self.deliver(other, self.put(), *[self.put(b"x" * size + b"\r\n") for _ in range(30)])
            self.assertEqual(sum(one[0].kind == "deferred" for one in results.values() if one), most)

    def test_what_a_primary_said_before_it_took_no_more_counts(self) -> None:
        """A reset of the connection shows at the first write, and the answers to sixteen messages are there to be read."""
        real, lost = etrn.Client.write, etrn.LostError("lost connection with m.example: Broken pipe")

        def hang_up(_: str) -> object:
            primary.clients[-1].sendall(b"250 2.0.0 ok\r\n")
            return CUT
        for last, kind in cases(self, [("250 2.0.0 ok\n421 4.7.0 enough", []), (hang_up, "deferred")]):
            primary = self.primary(RSET=["250 2.0.0 ok"] * 16 + [last])
            primary.extensions = ["PIPELINING", "CHUNKING"]
            ids = [self.put() for _ in range(20)]
            writes: List[bytes] = []

            def write(client: etrn.Client, data: bytes, seconds: float = 9.0, writes: List[bytes] = writes) -> None:
                writes.append(data)
                if data.count(b"BDAT") == 1 and len(writes) > 2:
                    raise lost
                real(client, data, seconds)
            with mock.patch.object(etrn.Client, "write", write):
                results, error = self.deliver(primary, *ids)
            self.assertEqual([results.get(id, []) and results[id][0].kind for id in ids], ["sent"] * 17 + [kind, [], []])
            self.assertEqual((len(primary.messages), self.courier.is_lost, "421" in error), (17, True, not kind))

    def test_a_verdict_without_its_rset_does_not_count_when_not_all_of_the_message_has_left(self) -> None:
        real = etrn.Courier._land

        def land(courier: etrn.Courier, is_cut: bool) -> Any:
            courier._flush()
            courier.flight[0].is_cut = is_cut and courier.taken == 1
            return real(courier)
        for is_cut, reply, kinds in cases(self, [(False, CUT, ["sent", "sent"]), (True, CUT, ["sent", "deferred"]),
                                                 (True, "250 ok", ["sent", "sent"])]):
            primary = self.primary(RSET=["250 ok", reply])
            primary.extensions = ["PIPELINING", "CHUNKING"]
            with mock.patch.object(etrn.Courier, "_land", functools.partialmethod(land, is_cut=is_cut)):
                results, _ = self.deliver(primary, self.put(), self.put())
            self.assertEqual([one[0].kind for one in results.values()], kinds)

    def test_of_a_write_that_failed_all_its_messages_are_cut(self) -> None:
        primary = self.primary()
        cfg = config("", "primary = " + primary.address).domain(DOMAIN)
        courier = etrn.Courier(self.spool, make_plan(cfg, cfg.primary), [].append)
        legs = [etrn.Leg(mock.Mock(), [], True) for _ in range(4)]
        courier.gathered, courier.unsent = legs[:2], b"x"
        with mock.patch.object(courier.client, "write", side_effect=[None, etrn.LostError("x"), None]):
            courier._flush(legs[1])                     # the second goes on in the next write
            courier.gathered += legs[2:]
            courier.unsent = b"y"
            courier._flush()
            courier._flush()
        self.assertEqual([(leg.is_sent, leg.is_cut) for leg in legs], [(True, False), (True, True), (True, True), (True, True)])
        self.assertTrue(courier.is_lost)

    def test_after_a_window_in_doubt_the_next_one_is_small_at_first(self) -> None:
        primary = self.primary()
        cfg = config("", "primary = " + primary.address).domain(DOMAIN)
        sizes = []
        for is_wary in (False, True):
            courier = etrn.Courier(self.spool, make_plan(cfg, cfg.primary)._replace(is_wary=is_wary), [].append)
            courier.chunking = courier.pipelining = True
            leg = mock.Mock(recipients=[1], parcel=mock.Mock(sidecar={"size": 10}))
            for courier.taken in (0, 1, 4, 40, 400):
                courier.flight.clear()
                while courier._has_room():
                    courier.flight.append(leg)
                sizes.append(len(courier.flight))
        self.assertEqual(sizes, [1, 16, 16, 16, 16, 1, 1, 2, 11, 16])

    def test_an_answer_of_421_ends_the_connection_in_good_order(self) -> None:
        for primary in self.every_way(MAIL=["250 ok", "421 4.3.2 enough for now"]):
            ids = [self.put() for _ in range(3)]
            results, error = self.deliver(primary, *ids)
            self.assertEqual(results[ids[0]][0].kind, "sent")
            self.assertIn("421", error)
            self.assertEqual(len(primary.messages), 1)

    def test_a_message_larger_than_the_primary_takes_is_deferred_untried(self) -> None:
        primary = self.primary()
        primary.extensions = ["PIPELINING", "SIZE 40"]
        id = self.put()
        results, _ = self.deliver(primary, id)
        self.assertEqual((self.kinds(results[id]), any(line.startswith("MAIL") for line in primary.log)),
                         (["deferred 5.3.4"], False))

    def test_an_internationalized_message_waits_for_a_primary_that_takes_it(self) -> None:
        id = self.put(smtputf8=True, sender="é@sender.example", recipients=["ü@" + DOMAIN])
        primary = self.primary()
        primary.extensions = ["PIPELINING", "8BITMIME"]
        results, _ = self.deliver(primary, id)
        self.assertEqual(self.kinds(results[id]), ["deferred 5.6.7"])
        primary.extensions = ["PIPELINING", "SMTPUTF8"]
        results, _ = self.deliver(primary, id)
        self.assertEqual(self.kinds(results[id]), ["sent 2.0.0"])
        self.assertEqual(primary.messages, [("é@sender.example", ["ü@" + DOMAIN], MESSAGE)])

    def test_eight_bit_mail_goes_as_it_is(self) -> None:
        primary = self.primary()
        for extensions, parameter in cases(self, [(["8BITMIME"], True), ([], False), (["PIPELINING"], False)]):
            primary.extensions = extensions
            primary.log.clear()
            self.deliver(primary, self.put(b"caf\xe9\r\n", body="8BITMIME"))
            self.assertEqual(primary.messages.pop()[2], b"caf\xe9\r\n")
            self.assertEqual("BODY=8BITMIME" in next(line for line in primary.log if line.startswith("MAIL")), parameter)

    def test_dsn_parameters_are_passed_on_where_dsn_is_offered(self) -> None:
        primary = self.primary()
        for extensions, offered in cases(self, [(["DSN"], True), (["PIPELINING"], False)]):
            primary.extensions = extensions
            primary.log.clear()
            id = self.put(ret="HDRS", envid="QQ+2B")
            self.spool.update(id, lambda sidecar: sidecar["recipients"][0].update(notify="FAILURE,DELAY", orcpt="rfc822;x@y"))
            self.deliver(primary, id)
            text = "\n".join(primary.log)
            for parameter in ("RET=HDRS", "ENVID=QQ+2B", "NOTIFY=FAILURE,DELAY", "ORCPT=rfc822;x@y"):
                self.assertEqual(parameter in text, offered)

    def test_a_damaged_body_is_never_sent(self) -> None:
        damaged, good = self.put(), self.put()
        with open(os.path.join(self.spool.path, damaged + ".eml"), "r+b") as file:
            file.write(b"X")
        primary = self.primary()
        results, _ = self.deliver(primary, damaged, good)
        self.assertIsInstance(self.outcomes[damaged].fault, etrn.Corrupt)
        self.assertEqual((self.kinds(results[good]), len(primary.messages)), (["sent 2.0.0"], 1))

    def test_the_next_host_of_a_route_is_tried(self) -> None:
        down, up = Primary(), self.primary()
        with down:
            cfg = config("", "primary = %s, %s\ntls = none" % (down.address, up.address)).domain(DOMAIN)
            hops, _ = etrn.find_route(make_plan(cfg, cfg.primary))
            self.assertEqual([hop.port for hop in hops], [down.port, up.port])
            reports: List[Any] = []
            courier = etrn.Courier(self.spool, make_plan(cfg, cfg.primary), reports.append)
            courier.inbox.put(None)
            courier.start()
            courier.join(DEADLINE_S)
            self.assertEqual([one.hop.port for one in reports if isinstance(one, etrn.Greeted)], [up.port])

    def introduced(self, verb: str, clients: Sequence[Dict[str, Any]], resolver: Optional[etrn.Resolver] = None,
                   **script: Any) -> Tuple[List[str], Primary]:
        """What a primary that offers XCLIENT or XFORWARD is told of each message's client, and the primary."""
        primary = self.primary(**script)
        primary.extensions = ["PIPELINING", verb + " NAME ADDR PROTO HELO PORT", "SIZE"]
        ids = [self.put(client=dict({"helo": "mx.b.example", "tls": None}, **one)) for one in clients]
        names = resolver or etrn.Resolver(())
        with mock.patch(__name__ + ".make_plan", lambda cfg, route: MAKE_PLAN(cfg, route, resolver=names)):
            results, error = self.deliver(primary, *ids, xclient="yes")
        self.assertEqual(([its[0].kind for its in results.values()], error), (["sent"] * len(ids), ""))
        return [line for line in primary.log if line.startswith(verb)], primary

    def test_the_original_client_is_handed_on_as_postfix_documents_it(self) -> None:
        zone = {("7.2.0.192.in-addr.arpa", etrn.PTR): ["mx.b.example"], ("mx.b.example", etrn.A): ["192.0.2.7"],
                ("8.2.0.192.in-addr.arpa", etrn.PTR): ["liar.example"], ("liar.example", etrn.A): ["192.0.2.1"]}
        with Dns(zone) as dns:
            resolver = etrn.Resolver((dns.endpoint,))
            for client, expected in cases(self, [
                    ({"address": "192.0.2.7"}, "NAME=mx.b.example ADDR=192.0.2.7 PROTO=ESMTP HELO=mx.b.example"),
                    ({"address": "192.0.2.8"}, "NAME=[UNAVAILABLE] ADDR=192.0.2.8 PROTO=ESMTP HELO=mx.b.example"),
                    ({"address": "192.0.2.9"}, "NAME=[UNAVAILABLE] ADDR=192.0.2.9 PROTO=ESMTP HELO=mx.b.example"),
                    ({"address": "2001:db8::1", "helo": "a b+c=\u00e9<x>"},
                     "NAME=[UNAVAILABLE] ADDR=IPV6:2001:db8::1 PROTO=ESMTP HELO=a+20b+2Bc+3D+C3+A9<x>"),
                    ({"address": "192.0.2.9", "helo": ""}, "NAME=[UNAVAILABLE] ADDR=192.0.2.9 PROTO=ESMTP HELO=[UNAVAILABLE]")]):
                for verb, code in (("XCLIENT", "220 again"), ("XFORWARD", "250 ok")):
                    said, primary = self.introduced(verb, [client], resolver, **{verb: code})
                    self.assertEqual(said, ["%s %s PORT=[UNAVAILABLE]" % (verb, expected)])
                    helos = [line.split()[1] for line in primary.log if line.upper().startswith("EHLO")]
                    theirs = client.get("helo", "mx.b.example")
                    if not re.fullmatch("[!-~]+", theirs):
                        theirs = "[%s]" % re.search("ADDR=(\\S+)", expected).group(1)        # type: ignore[union-attr]
                    self.assertEqual(helos, ["backup.example.net"] + [theirs] * (verb == "XCLIENT"))

    def test_xclient_comes_once_for_each_client_on_a_connection_and_xforward_for_each_message(self) -> None:
        one, two, own = {"address": "192.0.2.7"}, {"address": "192.0.2.8"}, {"address": "", "helo": ""}
        for verb, clients, expected in cases(self, [
                ("XCLIENT", [one, one, two, two, one], ["192.0.2.7", "192.0.2.8", "192.0.2.7"]),
                ("XCLIENT", [one, own, own], ["192.0.2.7", "127.0.0.1"]), ("XFORWARD", [one, one], ["192.0.2.7"] * 2)]):
            said, _ = self.introduced(verb, clients, **{verb: "220 again"})
            self.assertEqual([re.search("ADDR=(\\S+)", line).group(1) for line in said], expected)       # type: ignore[union-attr]

    def test_a_primary_that_does_not_let_us_introduce_a_client_gets_the_mail_all_the_same(self) -> None:
        for verb in cases(self, ["XCLIENT", "XFORWARD"]):
            self.introduced(verb, [{"address": "192.0.2.7"}, {"address": "192.0.2.8"}], **{verb: "550 5.7.0 not you"})

    def test_a_primary_that_hangs_up_on_a_client_has_had_that_message(self) -> None:
        primary = self.primary(XCLIENT=CUT)
        primary.extensions = ["XCLIENT ADDR"]
        ids = [self.put(), self.put()]
        results, _ = self.deliver(primary, *ids, xclient="yes")
        self.assertEqual([[one.kind for one in results.get(id, [])] for id in ids], [["deferred"], []])

    def test_a_dead_address_family_costs_a_moment_and_one_the_kernel_lacks_nothing(self) -> None:
        primary = self.primary()
        good = etrn.Hop("m.example", "127.0.0.1", primary.port)
        real = socket.socket

        def without_ipv6(family: int = socket.AF_INET, *rest: Any) -> socket.socket:
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "Address family not supported")
            return real(family, *rest)
        with mock.patch.object(etrn.socket, "socket", without_ipv6):
            found = list(itertools.islice(etrn.connect_each([etrn.Hop("m.example", "::1", 25), good]), 2))
        self.assertIsInstance(found[0][1], OSError)
        self.assertEqual(found[1][0], good)
        found[1][1].close()             # type: ignore[union-attr]
        with real() as deaf, shorten(STAGGER_S=0.1):
            deaf.bind(("127.0.0.1", 0))
            deaf.listen(0)
            dead = etrn.Hop("m.example", "127.0.0.1", deaf.getsockname()[1])
            full = [real() for _ in range(3)]
            for sock in full:           # a listener whose queue is full answers no more, like a host that is not there
                sock.setblocking(False)
                sock.connect_ex(dead[1:])
            began = time.monotonic()
            hop, sock = next(etrn.connect_each([dead, good]))       # type: ignore[assignment]
            self.assertEqual(hop, good)
            self.assertLess(time.monotonic() - began, 10)
            for one in [sock, *full]:
                one.close()

    def test_a_route_back_to_this_relay_is_refused(self) -> None:
        primary = self.primary()
        cfg = config("", "primary = %s" % primary.address).domain(DOMAIN)
        for listener in cases(self, [etrn.Endpoint("127.0.0.1", primary.port), etrn.Endpoint("0.0.0.0", primary.port)]):
            with self.assertRaisesRegex(etrn.PeerError, "loops back"):
                etrn.find_route(make_plan(cfg, cfg.primary, listeners=(listener,)))

    def test_a_customer_that_is_gone_before_our_ehlo_is_no_bug(self) -> None:
        ours, theirs = socket.socketpair()
        theirs.sendall(b"220 customer\r\n")
        theirs.close()
        cfg = config().domain(DOMAIN)
        reports: List[Any] = []
        for unsaid in cases(self, [b"", b"250 ok\r\n"]):
            courier = etrn.Turnaround(self.spool, make_plan(cfg, cfg.primary), reports.append, etrn.Hop("gw", "192.0.2.7", 9),
                                      ours, unsaid, b"" if unsaid else b"220 early\r\n")
            courier.run()
            self.assertEqual((reports[-1].bug, bool(reports[-1].error)), (None, True))

    def test_a_primary_that_greets_with_our_own_name_is_a_loop(self) -> None:
        results, error = self.deliver(self.primary(greeting="220 Backup.Example.net ESMTP"), self.put())
        self.assertEqual(results, {})
        self.assertIn("loops back", error)


class Puppet(etrn.Courier):
    """A courier without thread and socket: a Simulation says what its primary says."""

    def start(self) -> None:
        self.hop = etrn.Hop("primary.example", "192.0.2.1", 25)
        self.began = self.rested = Simulation.current.clock.mono
        Simulation.current.puppets.append(self)

    def play(self, sim: "Simulation") -> bool:
        """Its next step, if there is one now; False when it has ended."""
        if not self.is_greeted:
            word = sim.reach(self.plan.site)
            if word is HANG and sim.clock.mono - self.began < etrn.CONNECT_S:
                return True
            if word is not None:
                self.post(etrn.Finished(self, "connect to %s: %s" % (self.hop, "timed out" if word is HANG else word)))
                return False
            self.post(etrn.Greeted(self, self.hop, 0))
            return True
        if self.inbox.empty():
            if sim.clock.mono - self.rested < etrn.IDLE_CONNECTION_S:
                return True
        else:
            job = self.inbox.get()
            if job is not None and not self.is_over:
                self.rested = sim.clock.mono
                return self.send(sim, job)
        self.post(etrn.Finished(self, ""))
        return False

    def send(self, sim: "Simulation", job: etrn.Job) -> bool:
        self._open(job)
        if not self.legs:
            return True
        leg = self.legs.popleft()
        self.flight.append(leg)
        sim.offered.append((sim.clock.mono, job.id))
        for one in leg.recipients:
            said = sim.rcpt(one["address"])
            code, text = int(said[:3]), said[4:].encode()
            if code // 100 == 2:
                leg.accepted.append(one)
            else:
                self._give(leg, [one], code, text, False if etrn.is_no_such_user(code, text) else None)
        if leg.accepted:
            said = sim.dot(job.id)
            if said is CUT:
                self._abandon("lost connection with primary.example")
                self.post(etrn.Finished(self, "lost connection with primary.example"))
                return False
            self._give(leg, leg.accepted, int(said[:3]), said[4:].encode(), True)
            if said[0] == "2":
                sim.taken.append(job.id)
        self._end_leg(leg)
        return True


class Simulation:
    """A Manager whose clock is not real and whose primaries are functions: days pass in moments."""
    current: "Simulation"

    def __init__(self, folder: str, domain: str = "", relay: str = "", rest: str = "") -> None:
        Simulation.current = self
        self.clock = Clock()
        self.spool = opened(os.path.join(folder, "spool"))
        self.reports: "collections.deque[Any]" = collections.deque()
        self.puppets: List[Puppet] = []
        self.offered: List[Tuple[float, str]] = []      # (when, ID)
        self.taken: List[str] = []
        self.alerts: List[Dict[str, Any]] = []
        self.reach: Callable[[str], Any] = lambda site: None        # None: it greets; a text: why not; HANG
        self.rcpt: Callable[[str], str] = lambda address: "250 2.1.5 ok"
        self.dot: Callable[[str], Any] = lambda id: "250 2.0.0 taken"
        if "recipients" not in domain:
            domain += "\nrecipients = any"
        self.cfg = config("nameservers = 127.0.0.1:9\n" + relay, "primary = 192.0.2.1\n%s\n%s" % (domain, rest))
        self.log = etrn.Log("stderr", "debug", "backup.example.net")
        self.serial = 0
        self.begin()

    def begin(self) -> None:
        """The relay starts."""
        self.manager = etrn.Manager(self.cfg, self.spool, self.log, self.reports.append, self.clock.now)
        self.manager.committers.stop()
        self.manager.committers.submit = (          # type: ignore[method-assign]
            lambda work, done: self.reports.append(self.manager.committers._work([(work, done)])))
        inbox = mock.Mock(put=lambda item: self.alerts.append(item[1]))
        self.manager.alerts.inboxes = {etrn.run_alert_command: inbox, etrn.post_alert: inbox}
        self.puppets.clear()
        self.reports.clear()
        self.manager.load_state()
        self.manager._load(set(), False)
        self.turn()

    @property
    def site(self) -> etrn.Site:
        return self.manager.scheduler.site(DOMAIN, self.clock.now)

    def put(self, *addresses: str, domain: str = DOMAIN, **values: Any) -> str:
        self.serial += 1
        id = "%X" % (0xABC000 + self.serial)
        people = list(addresses) or ["u%d@%s" % (self.serial, domain)]
        assert store(self.spool, id, recipients=people, now=self.clock.wall, **values) is None
        self.manager.accept(self.spool.read_sidecar(id))
        return id

    def turn(self) -> None:
        while self.reports:
            self.manager.handle(self.reports.popleft(), self.clock.now)
        self.manager.tick(self.clock.now)
        self.puppets = [one for one in self.puppets if one.play(self)]

    def run(self, seconds: float = 0, hours: float = 0, until: Callable[[], Any] = lambda: False) -> None:
        """Let time pass; what happens at once takes a tenth of a second."""
        end = self.clock.mono + seconds + 3600 * hours
        while self.clock.mono < end and not until():
            self.turn()
            at = end if not self.reports else self.clock.mono
            if any(self.reach(one.plan.site) is not HANG or one.is_greeted for one in self.puppets):
                at = self.clock.mono
            at = min(at, self.manager.wake(self.clock.now))
            self.clock.advance(max(0.1, min(at, end) - self.clock.mono))

    def queued(self) -> int:
        return sum(len(site.entries) for site in self.manager.scheduler.sites.values())

    def logged(self, pattern: str) -> bool:
        return any(re.search(pattern, line) for line in self.log.lines)


class Recovery(Folder):
    """Days of a primary's life, on a clock that is not real."""

    def setUp(self) -> None:
        super().setUp()
        for patch in (mock.patch.object(etrn, "Courier", Puppet), mock.patch("os.fsync"),
                      mock.patch("time.time", lambda: Simulation.current.clock.wall)):
            patch.start()
            self.addCleanup(patch.stop)

    def simulate(self, *options: str, **more: str) -> Simulation:
        sim = Simulation(self.folder, *options, **more)
        self.addCleanup(sim.spool.close)
        return sim

    def down(self, sim: Simulation, count: int = 0, seconds: float = 60) -> List[str]:
        sim.reach = lambda site: "Connection refused"
        ids = [sim.put() for _ in range(count)]
        sim.run(seconds)
        self.assertIs(sim.site.state, etrn.Primary.DOWN)
        return ids

    def test_a_route_does_not_outlive_the_primary_it_led_to(self) -> None:
        good = {"route_of": "mx", "route": [["m.example", "192.0.2.1", 25]]}
        for known, primary, expected in cases(self, [
                (good, "mx", [("m.example", "192.0.2.1", 25)]), (good, (etrn.Endpoint("n.example", 25),), []), (None, "mx", []),
                (dict(good, route=[["192.0.2.1", 25]]), "mx", []), (dict(good, route=[["m.example", "x", 25]]), "mx", []),
                ({"route": good["route"]}, "mx", []), ([], "mx", [])]):
            self.assertEqual(etrn.parse_known_route(known, primary), expected)
        sim = self.simulate()
        sim.put()
        sim.run(5)
        self.assertTrue(sim.manager.plan(sim.site).last_route)
        sim.manager.scheduler.reconfigure(config("", "primary = n.example"), sim.clock.now)
        self.assertFalse(sim.manager.plan(sim.site).last_route)

    def test_a_primary_that_refuses_everybody_for_ten_minutes_loses_nobodys_mail(self) -> None:
        for reply in cases(self, ["550 5.1.1 no such user", "554 5.7.1 Relay access denied", "551 not here"]):
            sim = Simulation(os.path.join(self.folder, reply[:3]))
            ids = self.down(sim, 50)
            sim.reach, sim.rcpt = lambda site: None, lambda address, reply=reply: reply     # type: ignore[misc]
            sim.run(30)
            self.assertIs(sim.site.state, etrn.Primary.REJECTING)
            self.assertTrue(sim.logged(": rejecting: " + reply))
            began, offered = sim.clock.mono, len(sim.offered)
            late = sim.put()
            sim.run(570)
            self.assertLessEqual(len(sim.offered) - offered, 570 / sim.site.cfg.probe_interval + 1)
            self.assertGreater(len({id for at, id in sim.offered if at >= began}), 40)      # they take turns
            self.assertEqual((sim.queued(), sim.taken), (51, []))
            self.assertFalse([one for one, (good, _) in sim.manager.memory.known.items() if not good])
            sim.rcpt = lambda address: "250 ok"
            sim.run(30)
            self.assertEqual((sorted(sim.taken), sim.queued(), sim.site.state), (sorted(ids + [late]), 0, etrn.Primary.UP))
            self.assertTrue(sim.logged(r": up after rejecting for 9m\d+s, 51 messages waiting"))
            self.assertFalse(sim.logged("non-delivery"))
            sim.spool.close()

    def test_a_half_configured_primary_with_one_message_teaches_nothing_wrong(self) -> None:
        sim = self.simulate()
        self.down(sim, 1)
        sim.reach, sim.rcpt = lambda site: None, lambda address: "550 5.1.1 no such user"
        sim.run(600)
        self.assertEqual((sim.queued(), sim.manager.memory.knows("u1@" + DOMAIN, sim.clock.wall)), (1, None))
        sim.rcpt = lambda address: "250 ok"
        sim.run(hours=1)
        self.assertEqual(sim.queued(), 0)
        self.assertTrue(sim.manager.memory.knows("u1@" + DOMAIN, sim.clock.wall))

    def test_after_the_grace_a_second_refusal_is_final_and_a_steady_primary_is_believed_at_once(self) -> None:
        sim = self.simulate()
        self.down(sim, 1)
        sim.reach, sim.rcpt = lambda site: None, lambda address: "550 5.1.1 no such user"
        sim.run(3500)
        self.assertIn(DOMAIN, [site.name for site in sim.manager.scheduler.sites.values() if site.entries])
        sim.run(4500)
        self.assertEqual((len(sim.site.entries), sim.site.counters["bounced"]), (0, 1))
        self.assertEqual(sim.manager.memory.knows("u1@" + DOMAIN, sim.clock.wall), False)
        id = sim.put()
        sim.run(5)
        self.assertEqual((sim.site.counters["bounced"], id in sim.site.entries), (2, False))

    def test_a_refusal_right_after_our_own_restart_is_kept(self) -> None:
        sim = self.simulate()
        sim.put()
        sim.run(5)
        sim.run(hours=5)
        sim.rcpt = lambda address: "550 5.1.1 no such user"
        sim.put()
        sim.run(5)
        self.assertEqual(sim.site.counters["bounced"], 1)
        sim.manager.save_state()
        sim.turn()
        sim.begin()
        self.assertIs(sim.site.state, etrn.Primary.UNKNOWN)
        sim.put()
        sim.run(5)
        self.assertEqual((sim.site.counters["bounced"], len(sim.site.entries)), (1, 1))
        sim.run(hours=2)
        self.assertEqual(sim.site.counters["bounced"], 2)

    def test_content_a_steady_primary_refuses_is_final_and_a_known_recipient_is_not(self) -> None:
        sim = self.simulate()
        sim.put("u@" + DOMAIN)
        sim.run(hours=2)
        sim.dot = lambda id: "554 5.7.1 spam"
        sim.put("u@" + DOMAIN)
        sim.run(5)
        self.assertEqual(sim.site.counters["bounced"], 1)
        sim.rcpt = lambda address: "550 5.1.1 no such user"
        sim.put("u@" + DOMAIN)
        sim.run(60)
        self.assertEqual((sim.site.counters["bounced"], len(sim.site.entries)), (1, 1))
        self.assertTrue(sim.manager.memory.knows("u@" + DOMAIN, sim.clock.wall))
        sim.run(hours=2)
        self.assertEqual((sim.site.counters["bounced"], len(sim.site.entries)), (2, 0))
        self.assertIs(sim.manager.memory.knows("u@" + DOMAIN, sim.clock.wall), False)
        self.assertIs(sim.site.state, etrn.Primary.UP)

    def test_one_message_refused_again_and_again_makes_nothing_rejecting(self) -> None:
        sim = self.simulate("retry_interval = 1m\nmax_retry_interval = 1m")
        sim.put("u@" + DOMAIN)
        sim.run(hours=2)
        for known in cases(self, [True, False]):
            sim.rcpt = lambda address: "550 5.7.0 no"
            sim.put("u@" + DOMAIN if known else "v@" + DOMAIN)
            if not known:
                self.down(sim)
                sim.reach = lambda site: None
            sim.run(3000)
            self.assertIs(sim.site.state, etrn.Primary.UP)
            sim.run(3000)
            self.assertEqual(len(sim.site.entries), 0)

    def test_mail_that_came_by_a_wrong_clock_is_no_older_when_that_is_set(self) -> None:
        for when, left in cases(self, [("in this run", 1), ("before", 0)]):
            sim = Simulation(os.path.join(self.folder, when), "probe_interval = 1h")
            self.addCleanup(sim.spool.close)
            self.down(sim, 1)
            if when == "before":        # then its age may be real: the machine was off
                sim.clock.advance(60)
                sim.begin()
            sim.clock.jump(10 * 86400)
            sim.run(60)
            self.assertEqual(len(sim.site.entries), left)
            sim.run(hours=7 * 24)
            self.assertEqual((len(sim.site.entries), sim.site.counters["expired"]), (0, 1))

    def test_three_known_recipients_refused_in_a_row_make_even_a_steady_primary_rejecting(self) -> None:
        sim = self.simulate("probe_interval = 1m")
        people = ["u%d@%s" % (number, DOMAIN) for number in range(3)]
        for one in people:
            sim.put(one)
        sim.run(hours=5)
        sim.rcpt = lambda address: "550 5.1.1 no such user" if address in people else "250 ok"
        for one in people:
            self.assertIs(sim.site.state, etrn.Primary.UP)
            sim.put(one)
            sim.run(2)
        self.assertIs(sim.site.state, etrn.Primary.REJECTING)
        sim.run(hours=4)
        self.assertEqual((len(sim.site.entries), sim.site.state), (3, etrn.Primary.REJECTING))
        for left in cases(self, [3, 1, 0]):     # kept once more; then all but the third in a row; then that one
            sim.put("other@" + DOMAIN)
            sim.run(61)
            self.assertTrue(sim.logged(": up after rejecting for "))
            sim.log.lines.clear()
            sim.run(hours=1.5)
            self.assertEqual(len(sim.site.entries), left)

    def returned(self, heal: Callable[["Simulation"], None]) -> Tuple["Simulation", int]:
        """How much goes back when a primary that knew these recipients, and has refused all of them for hours, is healed."""
        sim = Simulation(os.path.join(self.folder, heal.__name__),
                         "probe_interval = 1m\nretry_interval = 1m\nmax_retry_interval = 1m")
        self.addCleanup(sim.spool.close)
        people = ["k%d@%s" % (number, DOMAIN) for number in range(8)]
        for one in people:
            sim.put(one)
        sim.run(hours=2)
        sim.reach = lambda site: "nobody there"
        for one in people:
            sim.put(one)
        sim.run(60)
        sim.reach, sim.rcpt = lambda site: None, lambda address: "550 5.1.1 half"
        sim.run(hours=2)
        self.assertIs(sim.site.state, etrn.Primary.REJECTING)
        heal(sim)
        sim.run(1800)
        self.assertIs(sim.site.state, etrn.Primary.REJECTING)
        return sim, sim.site.counters["bounced"]

    def test_a_primary_that_ceases_to_reject_but_for_some_loses_nobodys_mail(self) -> None:
        def take_one(sim: "Simulation") -> None:
            sim.rcpt = lambda address: "250 ok" if address[:2] == "k0" else "550 5.1.1 half"

        def flush(sim: "Simulation") -> None:
            next(etrn.run_command(sim.manager, {"command": "flush", "what": DOMAIN}))
            self.assertIs(sim.site.state, etrn.Primary.UP)

        def restart(sim: "Simulation") -> None:
            sim.manager.save_state()
            sim.turn()
            sim.begin()
        for heal in cases(self, [take_one, flush, restart]):
            sim, bounced = self.returned(heal)
            self.assertEqual(bounced, 0)
            sim.rcpt = lambda address: "250 ok"
            sim.run(hours=1)
            self.assertEqual((len(sim.site.entries), sim.site.counters["bounced"]), (0, 0))

    def test_a_third_second_refusal_in_a_row_is_not_believed(self) -> None:
        def take_one(sim: "Simulation") -> None:
            sim.site.pardoned = sim.clock.wall - 3 * 3600     # not long ago
            sim.rcpt = lambda address: "250 ok" if address[:2] == "k0" else "550 5.1.1 half"
        self.assertEqual(self.returned(take_one)[1], 2)

    def test_a_flush_by_command_ends_rejecting_and_one_by_etrn_does_not(self) -> None:
        sim = self.simulate()
        self.down(sim, 10)
        sim.reach, sim.rcpt = lambda site: None, lambda address: "550 5.7.1 no"
        sim.run(30)
        self.assertIs(sim.site.state, etrn.Primary.REJECTING)
        etrn.answer_etrn(sim.manager, DOMAIN, "192.0.2.1", "x")
        self.assertIs(sim.site.state, etrn.Primary.REJECTING)
        answers = etrn.run_command(sim.manager, {"command": "flush", "what": DOMAIN})
        next(answers)
        self.assertIs(sim.site.state, etrn.Primary.UP)
        sim.run(30)
        self.assertIs(sim.site.state, etrn.Primary.REJECTING)
        last = [one for one in answers if one][-1]
        self.assertEqual((last["exit"], last["deferred"], last["waiting"]), (etrn.EX_TEMPFAIL, 10, 10))

    def test_a_flood_of_etrns_makes_a_rejecting_primary_try_others_too(self) -> None:
        sim = self.simulate()
        ids = self.down(sim, 30)
        sim.reach, sim.rcpt = lambda site: None, lambda address: "550 no"
        sim.run(30)
        sim.offered.clear()
        for _ in range(200):
            sim.manager.flush(DOMAIN)
            sim.run(0.1)
        self.assertLessEqual(len(sim.offered), 22)
        self.assertEqual(len({id for _, id in sim.offered}), len(sim.offered))
        sim.rcpt = lambda address: "550 no" if address.startswith("u1@") else "250 ok"
        sim.run(20)
        self.assertEqual(sorted(sim.taken), ids[1:])

    def test_a_message_that_makes_the_primary_hang_up_keeps_no_other_waiting(self) -> None:
        sim = self.simulate()
        ids = self.down(sim, 40)
        sim.reach, sim.dot = lambda site: None, lambda id: CUT if id == ids[0] else "250 ok"
        sim.run(30)
        self.assertEqual((sorted(sim.taken), list(sim.site.entries)), (ids[1:], [ids[0]]))
        self.assertLessEqual([id for _, id in sim.offered].count(ids[0]), 5)        # its own pauses: 1, 4, 16 seconds

    @shorten(QUICK_PACE_S=0.0)          # no real time passes here, so that every primary would seem a quick one
    def test_the_canary_and_then_the_queue_by_ever_more_connections(self) -> None:
        sim = self.simulate("connections = 4")
        ids = self.down(sim, 300)
        sim.reach = lambda site: None
        seen = []
        while sim.queued():
            sim.run(0.1)
            seen.append((len(sim.taken), len(sim.puppets)))
        self.assertEqual(max(lines for _, lines in seen), 4)
        self.assertTrue(all(lines <= 1 for taken, lines in seen if not taken))
        self.assertEqual(sim.offered[0][1], ids[0])
        self.assertNotEqual(sim.offered[0][0], sim.offered[1][0])
        self.assertEqual(sorted(sim.taken), ids)

    @shorten(QUICK_PACE_S=0.0)
    def test_halved_connections_close_and_do_not_only_stop_growing(self) -> None:
        sim = self.simulate("connections = 8")
        self.down(sim, 400)
        sim.reach = lambda site: None
        sim.run(60, until=lambda: len(sim.puppets) == 8)
        self.assertEqual(len(sim.puppets), 8)
        sim.dot = lambda id: "451 4.3.0 later"
        sim.run(10, until=lambda: sim.site.limit == 1)
        sim.run(1)
        self.assertLessEqual(len(sim.puppets), 1 + 1)

    def test_a_greylisting_primary_is_offered_all_at_once_and_again_after_a_minute_and_five(self) -> None:
        sim = self.simulate()
        ids = self.down(sim, 20)
        tries: Dict[str, int] = collections.Counter()

        def greylist(id: str) -> str:
            tries[id] += 1
            return "450 4.2.0 Greylisted" if tries[id] < 3 else "250 ok"
        sim.reach, sim.dot = lambda site: None, greylist
        sim.run(480)
        self.assertEqual(sorted(sim.taken), ids)
        its = [at for at, id in sim.offered if id == ids[-1]]
        self.assertEqual(len(its), 3)
        self.assertTrue(60 <= its[1] - its[0] < 62 and 300 <= its[2] - its[1] < 302, its)

    def test_many_dead_domains_keep_no_live_one_waiting(self) -> None:
        dead = ["d%d.example" % number for number in range(150)]
        sim = self.simulate(rest="".join("[domain %s]\nprimary = 192.0.2.1\n" % one for one in dead))
        sim.reach = lambda site: HANG if site != DOMAIN else None
        for one in dead:
            sim.put(domain=one)
        sim.run(120)
        self.assertLessEqual(len(sim.puppets), etrn.LINES_MAX)
        for _ in range(5):
            id = sim.put()
            sim.run(1)
            self.assertIn(id, sim.taken)
            sim.run(20)
        tried = {one.name for one in sim.manager.scheduler.sites.values() if one.failures}
        self.assertEqual(tried, set(dead))              # nor do they keep one another
        sim.reach = lambda site: HANG if site not in (DOMAIN, dead[149]) else None
        sim.run(90)
        self.assertFalse(sim.manager.scheduler.sites[dead[149]].entries)

    def test_notices_to_dead_hosts_leave_lines_for_the_mail(self) -> None:
        sim = self.simulate()
        for number in range(150):
            sim.put("a@s%d.example" % number, kind="notice", sender="")
        sim.reach = lambda site: HANG if site.startswith(etrn.NOTICES) else None
        sim.run(60)
        self.assertEqual(len(sim.puppets), etrn.NOTICE_LINES_MAX)
        sim.put()
        sim.run(1)
        self.assertEqual(len(sim.taken), 1)

    def test_busy_domains_make_room_for_one_that_has_no_connection(self) -> None:
        names = ["d%d.example" % number for number in range(4)]
        sim = self.simulate(rest="".join("[domain %s]\nprimary = 192.0.2.1\n" % one for one in names))
        with shorten(LINES_MAX=4, LINES_RESERVED=1):
            for one in names * 60:
                sim.put(domain=one)
            sim.run(2)
            self.assertEqual(len(sim.puppets), 4)
            id = sim.put()
            sim.run(3, until=lambda: id in sim.taken)
            self.assertIn(id, sim.taken)
            self.assertGreater(sim.queued(), 50)

    def test_a_primary_away_for_a_week_and_a_relay_away_for_eight_days(self) -> None:
        sim = self.simulate("probe_interval = 1h")
        first = self.down(sim, 1)[0]
        sim.run(hours=24 * 6.9)
        self.assertEqual(list(sim.site.entries), [first])
        sim.run(hours=4)
        self.assertEqual((len(sim.site.entries), sim.site.counters["expired"]), (0, 1))
        self.assertTrue(sim.logged(r"status=expired \(connect to .*Connection refused"))
        id = sim.put()
        sim.run(1)
        sim.manager.save_state()
        sim.turn()
        sim.clock.advance(days=8)
        sim.begin()
        failures = sim.site.failures
        sim.run(hours=4, until=lambda: not sim.site.entries)
        self.assertEqual(sim.site.counters["expired"], 2, id)
        self.assertIn(sim.site.failures - failures, (etrn.ATTEMPTS_MIN, etrn.ATTEMPTS_MIN + 1))     # it looks once a second

    def test_a_clock_that_jumps_either_way_expires_and_believes_nothing(self) -> None:
        for jump in cases(self, [30 * 86400, -30 * 86400]):
            sim = Simulation(os.path.join(self.folder, str(jump)))
            sim.put("u@" + DOMAIN)
            sim.run(60)
            self.down(sim, 1)
            sim.reach, sim.rcpt = lambda site: None, lambda address: "550 5.1.1 no such user"
            sim.run(30)
            sim.clock.jump(jump)
            sim.manager.flush(DOMAIN)
            sim.run(30)
            self.assertEqual((len(sim.site.entries), sim.site.counters["expired"] + sim.site.counters["bounced"]), (1, 0))
            sim.run(9000)               # forwards it is past its time after three more attempts
            self.assertEqual(sim.site.counters["bounced"] + sim.site.counters["expired"], 1)
            sim.spool.close()

    def test_an_outage_without_alerts_leaves_the_loop_asleep(self) -> None:
        for relay in cases(self, ["", "[alerts]\ncommand = /bin/true\n"]):
            sim = Simulation(os.path.join(self.folder, str(len(relay))), rest=relay)
            self.down(sim, 1)
            sim.clock.advance(400)
            sim.turn()
            sim.turn()
            self.assertGreater(sim.manager.wake(sim.clock.now), sim.clock.mono)
            sim.manager.alerts.down[DOMAIN] = (sim.clock.mono, "due before the next sweep")
            self.assertGreaterEqual(sim.manager.wake(sim.clock.now), min(sim.manager.next_sweep, sim.site.next_probe))
            sim.spool.close()

    def notices(self, sim: Simulation) -> List[Tuple[str, Any]]:
        """Targets and parsed notices that wait in the spool."""
        sim.turn()
        out = []
        for site in sim.manager.scheduler.sites.values():
            for id in site.entries if site.cfg.is_notices else ():
                sidecar = sim.spool.read_sidecar(id)
                message = sim.spool.read_message(id, sidecar)
                self.assertEqual((sidecar["sender"], sidecar["kind"]), ("", "notice"))
                parsed = email.message_from_bytes(b"".join(message.blocks()), policy=email.policy.default)
                message.close()
                out.append((sidecar["recipients"][0]["address"], parsed))
        return out

    def test_who_is_told_what_is_as_notify_asks(self) -> None:
        for notify, failed, delayed, relayed in cases(self, [
                ("", 1, 1, 0), ("NEVER", 0, 0, 0), ("FAILURE", 1, 0, 0), ("DELAY", 0, 1, 0), ("SUCCESS", 0, 0, 1),
                ("SUCCESS,FAILURE,DELAY", 1, 1, 1)]):
            for event, expected in (("failed", failed), ("delayed", delayed), ("relayed", relayed)):
                sim = Simulation(tempfile.mkdtemp(dir=self.folder), "delay_notice = 4h\nprobe_interval = 1h\nlifetime = 2d")
                sim.reach = lambda site: "Connection refused"
                people = [dict(sidecar_of("A")["recipients"][0], address="%s@%s" % (name, DOMAIN), notify=notify,
                               expires=sim.clock.wall + 2 * 86400, orcpt="rfc822;old+2B@x.example") for name in ("u", "v")]
                self.assertIsNone(sim.spool.commit([(etrn.Draft("ABC001"), [MESSAGE], dict(
                    sidecar_of("ABC001"), recipients=people, envid="Q+2BX", received=sim.clock.wall, ret="FULL"))])[0])
                sim.manager.accept(sim.spool.read_sidecar("ABC001"))
                if event == "relayed":
                    sim.reach = lambda site: None if site == DOMAIN else "Connection refused"
                sim.run(hours={"failed": 49, "delayed": 24, "relayed": 1}[event])
                found = [one for one in self.notices(sim) if one[1]["Subject"] == etrn._SUBJECTS[event]]
                self.assertEqual((event, len(found)), (event, expected))        # one for both recipients, once
                for target, one in found:
                    self.assertEqual(target, "a@sender.example")
                    parts = list(one.iter_parts())
                    whole, first, second = parts[1].get_payload()
                    self.assertEqual((whole["Original-Envelope-Id"], first["Action"], second["Action"],
                                      first["Original-Recipient"]), ("Q+X", event, event, "rfc822; old+@x.example"))
                    self.assertEqual(first["Status"][0], "2" if event == "relayed" else "4")
                    self.assertEqual("Will-Retry-Until" in first, event == "delayed")
                    self.assertEqual(parts[2].get_content_type() == "message/rfc822", event == "failed")        # as RET asked
                sim.spool.close()

    def test_a_primary_that_offers_dsn_confirms_by_itself(self) -> None:
        sim = self.simulate()
        with mock.patch.object(etrn.Client, "__init__", lambda client, hostname: (
                None, setattr(client, "esmtp_features", {"dsn": ""}), setattr(client, "sock", None))[0]), \
                mock.patch.object(etrn.Client, "close"):
            sim.reach = lambda site: None if site == DOMAIN else "Connection refused"
            people = [dict(sidecar_of("A")["recipients"][0], notify="SUCCESS")]
            sim.spool.commit([(etrn.Draft("ABC001"), [MESSAGE], dict(sidecar_of("ABC001"), recipients=people))])
            sim.manager.accept(sim.spool.read_sidecar("ABC001"))
            sim.run(60)
        self.assertEqual((sim.taken, self.notices(sim)), (["ABC001"], []))

    def test_a_notice_nobody_takes_for_days_goes_to_the_postmaster_once_and_then_ends(self) -> None:
        for postmaster in cases(self, ["", "postmaster = pm@home.example"]):
            sim = Simulation(tempfile.mkdtemp(dir=self.folder), "probe_interval = 1h\nlifetime = 1d",
                             rest="[bounces]\n%s\n[defaults]\nlifetime = 1d\nprobe_interval = 1h\n" % postmaster)
            sim.reach = lambda site: "Connection refused"
            sim.put()
            sim.run(hours=26)
            self.assertEqual([target for target, _ in self.notices(sim)], ["a@sender.example"])
            sim.run(hours=24 * 4)
            self.assertEqual([target for target, _ in self.notices(sim)], ["a@sender.example"])     # 5 days, not one
            sim.run(hours=26)
            self.assertEqual([target for target, _ in self.notices(sim)], ["pm@home.example"] if postmaster else [])
            sim.run(hours=24 * 6)
            self.assertEqual((self.notices(sim), sim.queued(), spool_files(sim.spool.path)), ([], 0, []))
            self.assertTrue(sim.logged("double bounce: dropped"))
            sim.spool.close()

    def test_size_and_smtputf8_end_as_notices_that_say_so(self) -> None:
        for values, status in cases(self, [({"size": 5000}, "5.3.4"), ({"smtputf8": True}, "5.6.7")]):
            sim = Simulation(tempfile.mkdtemp(dir=self.folder), "lifetime = 1d")
            sim.reach = lambda site: None if site == DOMAIN else "Connection refused"
            id = sim.put(**{name: value for name, value in values.items() if name != "size"})
            limit = 10 if "size" in values else 0
            with mock.patch.object(etrn.Courier, "_size_limit", lambda courier, limit=limit: limit):
                sim.put()
                sim.run(hours=23)
                self.assertIn(id, sim.site.entries)
                sim.run(hours=2)
            self.assertNotIn(id, sim.site.entries)
            (target, one), *_ = self.notices(sim)
            self.assertEqual((target, list(one.iter_parts())[1].get_payload()[1]["Status"]), ("a@sender.example", status))
            sim.spool.close()

    def test_alerts_come_once_for_each_turn_of_events(self) -> None:
        sim = self.simulate(rest="[alerts]\ncommand = /bin/true\n")
        self.down(sim, 3, 290)
        self.assertEqual(sim.alerts, [])
        sim.run(20)
        self.assertEqual([(one["event"], one["domain"], one["waiting"]) for one in sim.alerts], [("down", DOMAIN, 3)])
        sim.manager.save_state()
        sim.turn()
        sim.begin()                     # a restart in the outage neither repeats nor forgets it
        sim.run(hours=1)
        sim.reach, sim.rcpt = lambda site: None, lambda address: "550 no"
        sim.run(60)
        sim.rcpt = lambda address: "250 ok"
        sim.run(60)
        self.assertEqual([one["event"] for one in sim.alerts], ["down", "up", "rejecting", "up"])
        self.assertRegex(sim.alerts[1]["text"], r"up after 1h5m, 3 messages waiting")
        self.assertRegex(sim.alerts[3]["text"], r"up after rejecting for \d\ds, 3 messages waiting")
        self.down(sim, 1, 60)           # too short to be worth a word
        sim.reach = lambda site: None
        sim.run(400)
        self.assertEqual(len(sim.alerts), 4)

    def test_an_outage_that_began_before_a_restart_is_told_in_time(self) -> None:
        sim = self.simulate(rest="[alerts]\ncommand = /bin/true\n")
        self.down(sim, 1, 100)
        sim.manager.save_state()
        sim.turn()
        sim.begin()
        sim.run(150)
        self.assertEqual(sim.alerts, [])
        sim.run(100)
        self.assertEqual([one["event"] for one in sim.alerts], ["down"])

    def test_mail_about_to_expire_is_told_a_day_before_and_short_lifetimes_are_no_cause(self) -> None:
        sim = self.simulate("probe_interval = 1h", rest="[alerts]\ncommand = /bin/true\nafter = 7d\n")
        self.down(sim, 1)
        sim.run(hours=24 * 5.9)
        self.assertEqual(sim.alerts, [])
        sim.run(hours=4)
        self.assertEqual([one["event"] for one in sim.alerts], ["expiring"])
        self.assertIn("23h", sim.alerts[0]["text"])
        sim = Simulation(os.path.join(self.folder, "short"), "lifetime = 12h", rest="[alerts]\ncommand = /bin/true\n")
        sim.put()
        sim.run(1)
        self.assertEqual(sim.alerts, [])
        sim.spool.close()

    def test_word_about_recipients_is_believed_only_of_a_primary_that_is_itself(self) -> None:
        sim = self.simulate("recipients = verify")
        with mock.patch.object(etrn.Inquirer, "start", lambda inquirer: None):
            for state, word, expected, known in cases(self, [
                    ("fresh", "bad", "bad", False), ("returned", "bad", "bad", None), ("proven", "bad", "bad", False),
                    ("fresh", "good", "good", True), ("rejecting", "good", "silent", None), ("waited for", "bad", "silent", None),
                    ("waited for", "good", "good", True)]):
                address = "%s%s@%s" % (state, word, DOMAIN)
                site, now = sim.site, sim.clock.now
                if state == "waited for" and not site.entries:
                    sim.put()
                site.state = etrn.Primary.REJECTING if state == "rejecting" else etrn.Primary.UP
                site.recovered = 0.0 if state == "fresh" else now.wall
                site.is_returning = state in ("returned", "waited for")
                heard: List[str] = []
                sim.manager.ask(site, address, lambda word, text, heard=heard: heard.append(word))      # type: ignore[misc]
                inquirer, = sim.manager.inquirers
                sim.manager.handle(etrn.Answered(inquirer, address, word, "550 5.1.1 no"), now)
                self.assertEqual((heard, sim.manager.memory.knows(address, now.wall)), ([expected], known))
                sim.manager.inquirers.clear()


# == 11. RELAY =================================================================
# The whole relay, mostly as a process of its own, with real sockets and signals.

class Relays(Folder):
    def primary(self, **script: Any) -> Primary:
        """A primary that is down."""
        primary = Primary(**script)
        self.addCleanup(primary.__exit__)
        return primary

    def relay(self, primary: Union[Primary, str, None] = None, **options: Any) -> Relay:
        """A running relay."""
        target = primary.address if isinstance(primary, Primary) else primary or self.primary().address
        self.serial = getattr(self, "serial", 0) + 1
        folder = os.path.join(self.folder, str(self.serial))
        os.mkdir(folder)
        relay = Relay(folder, target, **options)
        self.addCleanup(relay.__exit__)
        return relay.start()


def without_received(data: bytes) -> bytes:
    """The message without its first Received field."""
    return re.sub(rb"\AReceived:[^\r]*(?:\r\n[ \t][^\r]*)*\r\n", b"", data)


class Life(Relays):
    BODIES = [MESSAGE, b"", b"\r\n", b".\r\n..\r\n...\r\n",
              b"Received: from elsewhere\r\n\tby x; y\r\nSubject: \xff\r\n\r\n\x01 caf\xe9\r\n",
              b"Subject: long\r\n\r\n" + b"y" * 300000 + b"\r\n"]

    def test_mail_taken_while_the_primary_is_down_arrives_when_it_is_back(self) -> None:
        primary = self.primary()
        relay = self.relay(primary)
        for body in self.BODIES:
            self.assertRegex(relay.send(body, recipients=["user@" + DOMAIN, "other@" + DOMAIN]),
                             r"\A250 2\.0\.0 .*queued as [0-9A-F]+\Z")
        relay.logged(r"primary\[\d+\]: ourdom\.example: down: connect to .*: Connection refused")
        self.assertEqual(len(relay.files()), 2 * len(self.BODIES))
        primary.start()
        wait(relay.is_empty, "an empty spool")
        self.assertEqual([data for _, _, data in primary.messages if not data.startswith(b"Received: from client.example")], [])
        self.assertEqual(sorted(without_received(data) for _, _, data in primary.messages), sorted(self.BODIES))
        self.assertEqual({(sender, *people) for sender, people, _ in primary.messages},
                         {("a@sender.example", "user@" + DOMAIN, "other@" + DOMAIN)})
        relay.logged(r"primary\[\d+\]: ourdom\.example: up after .*, \d+ messages waiting")
        relay.logged(r"smtp\[\d+\]: [0-9A-F]+: to=<user@ourdom\.example>, relay=127\.0\.0\.1\[127\.0\.0\.1\]:\d+, delay=.*, "
                     r"dsn=2\.0\.0, status=sent \(250 ")
        relay.logged(r"qmgr\[\d+\]: [0-9A-F]+: removed")

    def test_bdat_and_a_message_in_pieces_arrive_whole(self) -> None:
        primary = self.primary().start()
        relay = self.relay(primary)
        with relay.client() as client:
            client.say("MAIL FROM:<>", "RCPT TO:<user@%s>" % DOMAIN)
            client.raw(b"BDAT 6\r\n.a\r\n.\rBDAT 3 LAST\r\n\nb\n")
            self.assertEqual([client.reply()[:3], client.reply()[:3]], ["250", "250"])
            client.say("MAIL FROM:<>", "RCPT TO:<user@%s>" % DOMAIN, "DATA")
            for octet in b"x\r\n..y\r\n.\r\n":
                client.raw(bytes([octet]))
            self.assertEqual(client.reply()[:3], "250")
        wait(lambda: len(primary.messages) == 2)
        self.assertEqual([without_received(one[2]) for one in primary.messages], [b".a\r\n.\r\nb\r\n", b"x\r\n.y\r\n"])

    def test_a_client_that_breaks_off_leaves_nothing(self) -> None:
        relay = self.relay()
        for begun in cases(self, ["", "MAIL FROM:<>", "DATA", "body"]):
            client = relay.client()
            if begun:
                client.say("MAIL FROM:<>", "RCPT TO:<user@%s>" % DOMAIN)
            if begun in ("DATA", "body"):
                client.say("DATA")
                client.raw(b"x" * (400000 if begun == "body" else 10))
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
        wait(lambda: relay.json("--status")["connections"] == 0, "no connections")
        wait(lambda: not os.listdir(os.path.join(relay.spool, "incoming")), "an empty incoming/")
        self.assertEqual(relay.files(), [])

    def test_a_message_to_two_domains_waits_for_each_primary_by_itself(self) -> None:
        one, two = self.primary().start(), self.primary()
        relay = self.relay(one, domain="[domain two.example]\nprimary = %s\n" % two.address)
        relay.send(recipients=["a@" + DOMAIN, "b@two.example"])
        wait(lambda: one.messages, "the first half")
        wait(lambda: [row["domain"] for row in relay.queue()] == ["two.example"], "the second half to remain")
        two.start()
        wait(relay.is_empty, "an empty spool")
        self.assertEqual([[people for _, people, _ in each.messages] for each in (one, two)],
                         [[["a@" + DOMAIN]], [["b@two.example"]]])

    def test_what_is_deferred_stays_with_its_answer_and_what_is_refused_is_kept_in_the_grace(self) -> None:
        for said, expected in cases(self, [("450 4.2.0 Greylisted", "450 4.2.0 Greylisted"),
                                           ("550 5.1.1 no such user", "550 5.1.1 no such user")]):
            primary = self.primary(RCPT=said).start()
            relay = self.relay(primary)
            relay.send()
            wait(lambda: relay.queue()[0]["recipients"][0]["last_response"] == expected, "its answer in the queue")     # noqa: B023
            self.assertEqual([one["attempts"] for row in relay.queue() for one in row["recipients"]], [1])
            self.assertEqual(len(relay.files()), 2)

    def test_a_damaged_body_is_set_aside_and_the_rest_delivered(self) -> None:
        primary = self.primary()
        relay = self.relay(primary)
        for _ in range(3):
            relay.send()
        bad = relay.queue()[1]["id"]
        with open(os.path.join(relay.spool, bad + ".eml"), "r+b") as file:
            file.write(b"X")
        primary.start()
        wait(relay.is_empty, "an empty spool")
        self.assertEqual(sorted(os.listdir(os.path.join(relay.spool, "corrupt"))), [bad + ".eml", bad + ".json"])
        self.assertEqual(len(primary.messages), 2)
        wait(lambda: relay.json("--status")["spool"]["corrupt"] == 1, "the pair to be counted")
        relay.logged(r"qmgr\[\d+\]: warning: %s: corrupt: " % bad)

    def test_a_pair_copied_in_is_delivered_after_sighup(self) -> None:
        first, primary = self.relay(), self.primary().start()
        first.send()
        second = self.relay(primary)
        for name in first.files():
            shutil.copy2(os.path.join(first.spool, name), second.spool)
        second.signal(signal.SIGHUP)
        wait(second.is_empty, "an empty spool")
        self.assertEqual([without_received(data) for _, _, data in primary.messages], [MESSAGE])

    def test_a_queue_survives_a_restart_with_what_is_held(self) -> None:
        primary = self.primary()
        relay = self.relay(primary)
        relay.send(sender="one@x.example")
        relay.send(sender="two@x.example")
        held = relay.queue()[0]["id"]
        self.assertEqual(relay.run("--hold", held)[0], 0)
        self.assertEqual(relay.end(), 0)
        primary.start()
        relay.start()
        wait(lambda: primary.messages, "the other message")
        wait(lambda: len(relay.files()) == 2, "the pair of the held one alone")
        self.assertEqual([(row["id"], row["state"]) for row in relay.queue()], [(held, "held")])
        relay.run("--release", held)
        wait(relay.is_empty, "an empty spool")
        self.assertEqual([sender for sender, _, _ in primary.messages], ["two@x.example", "one@x.example"])

    def test_a_primary_that_connects_to_us_is_tried_at_once(self) -> None:
        primary = self.primary()
        relay = self.relay(primary, domain="probe_interval = 1h", PROBE_FIRST_S=3600.0)
        relay.send()
        relay.logged(": down: ")
        primary.start()
        relay.client().close()
        wait(relay.is_empty, "an empty spool")

    def test_sigusr1_delivers_at_once(self) -> None:
        primary = self.primary()
        relay = self.relay(primary, domain="probe_interval = 1h", PROBE_FIRST_S=3600.0)
        relay.send()
        relay.logged(": down: ")
        primary.start()
        relay.signal(signal.SIGUSR1)
        wait(relay.is_empty, "an empty spool")
        relay.logged(r"flush\[\d+\]: signal: site=all, messages=1")

    def test_sighup_rereads_a_good_configuration_and_keeps_the_old_one_from_a_bad(self) -> None:
        relay = self.relay()
        with relay.client() as client:
            self.assertEqual(client.say("MAIL FROM:<>", "RCPT TO:<u@new.example>")[:3], "554")
        relay.write_config(domain="[domain new.example]\n")
        relay.signal(signal.SIGHUP)
        relay.logged("configuration reread")
        with relay.client() as client:
            self.assertEqual(client.say("MAIL FROM:<>", "RCPT TO:<u@new.example>")[:3], "250")
        relay.write_config(domain="nonsense = 1\n")
        relay.signal(signal.SIGHUP)
        relay.logged(r"master\[\d+\]: error: not reloaded, the old configuration stays: .*etrn\.conf:\d+: "
                     r"unknown option 'nonsense'")
        with relay.client() as client:
            self.assertEqual(client.say("MAIL FROM:<>", "RCPT TO:<u@new.example>")[:3], "250")

    def test_sighup_changes_limits_and_the_log_and_takes_all_or_nothing(self) -> None:
        def reload(expected: str, **values: str) -> None:
            relay.write_config(**values)
            since = len(relay.log)
            relay.signal(signal.SIGHUP)
            relay.logged(expected, since)

        def let_in() -> int:
            with contextlib.ExitStack() as stack:
                wires = [stack.enter_context(Wire(relay.port)) for _ in range(4)]
                return sum(wire.greeting.startswith("220") for wire in wires)
        relay = self.relay(relay="max_connections = 2")
        self.assertEqual(let_in(), 2)
        for most in (3, 1):
            reload("configuration reread", relay="max_connections = %d" % most)
            wait(lambda most=most: let_in() == most, "the new limit")   # those before may not have left yet
        port = unused_port()
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            reload("not reloaded, the old configuration stays: cannot listen on .*: Address already in use",
                   relay="max_connections = 4\nodmr_listen = 127.0.0.1:%d, 127.0.0.1:%d" % (
                       port, taken.getsockname()[1]))
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            self.fail("a port of the refused configuration is open")
        self.assertEqual(let_in(), 1)
        other = os.path.join(relay.folder, "other.log")
        relay.write_config(relay="log = other.log")
        relay.signal(signal.SIGHUP)
        wait(lambda: os.path.exists(other) and "configuration reread" in open(other, encoding="utf-8").read(),   # noqa: SIM115
             "the new log")
        relay.write_config(relay="log = missing/other.log")
        relay.signal(signal.SIGHUP)
        wait(lambda: "not reloaded" in open(other, encoding="utf-8").read(), "the old log")     # noqa: SIM115

    def test_signals_during_the_start_are_not_the_end(self) -> None:
        code = ("import os, signal; import etrn_relay as e\ndef assume(self, spool):\n"
                "    os.kill(os.getpid(), signal.SIGHUP); os.kill(os.getpid(), signal.SIGUSR1); raise OSError(0, 'seen')\n"
                "e.Account.assume = assume; e.start_lean = lambda: None\n"
                "raise SystemExit(e.main(['--config', %r]))" % self.config_file())
        done = subprocess.run([sys.executable, "-c", code], cwd=HERE, stderr=subprocess.PIPE)
        self.assertEqual((done.returncode, done.stderr), (78, b"etrn_relay.py: seen\n"))

    def test_an_address_that_cannot_be_bound_is_told_with_its_error(self) -> None:
        """Its number says what to do: a port of somebody else's is no fault of the configuration."""
        # Where `listen` is the default, IPv6 may be missing, but not for other ports.
        usual = etrn.KINDS["listen"](next(one.default for one in etrn.OPTIONS if one.name == "listen"))
        with Local(self.folder) as local, mock.patch.object(local.server, "_bind", side_effect=OSError(errno.EACCES, "not you")):
            server, listeners = local.server, local.server.listeners
            server.listeners = dict.fromkeys(usual, next(iter(listeners.values())))
            server.cfg = dataclasses.replace(local.cfg, listen=usual, odmr_listen=(etrn.Endpoint("::1", 366),))
            with self.assertRaises(OSError) as caught:
                server.listen()
            server.cfg, server.listeners = local.cfg, listeners
        self.assertEqual((caught.exception.errno, caught.exception.strerror),
                         (errno.EACCES, "cannot listen on [::1]:366: not you"))
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            with open(self.config_file(), "r+", encoding="ascii") as file:
                text = file.read().replace("[relay]\n", "[relay]\nlisten = 127.0.0.1:%d\n" % taken.getsockname()[1])
                file.seek(0)
                file.write(text)
            done = subprocess.run([*COMMAND, "--config", file.name], stderr=subprocess.PIPE)
        self.assertEqual((done.returncode, done.stderr.partition(b"cannot listen on ")[2].partition(b": ")[2]),
                         (75, b"Address already in use\n"))

    def config_file(self) -> str:
        path = os.path.join(self.folder, "start.conf")
        with open(path, "w", encoding="ascii") as file:
            file.write("[relay]\nspool = spool\n[domain x.example]\n")
        return path

    def test_a_log_file_is_reopened_on_sighup(self) -> None:
        relay = Relay(self.folder, "127.0.0.1:9", relay="log = relay.log")
        path = os.path.join(self.folder, "relay.log")
        relay.process = subprocess.Popen([sys.executable, SOURCE, "--config", relay.file], stdin=subprocess.DEVNULL)
        self.addCleanup(relay.__exit__)
        relay.reader = threading.Thread(target=lambda: None)
        relay.reader.start()

        def says(text: str) -> bool:
            with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
                return text in file.read()
            return False
        wait(lambda: says("started"), "the log")
        os.rename(path, path + ".1")
        relay.signal(signal.SIGHUP)
        wait(lambda: says("configuration reread"), "the new log")
        self.assertEqual(relay.end(), 0)

    def test_sigterm_stops_within_five_seconds_whoever_hangs(self) -> None:
        primary = self.primary(**{".": HANG}).start()
        relay = self.relay(primary)
        relay.send()
        wait(lambda: primary.uses["."], "a delivery under way")
        with relay.client() as idle, relay.client() as busy:
            busy.say("MAIL FROM:<>", "RCPT TO:<user@%s>" % DOMAIN, "DATA")
            busy.raw(b"half a mess")
            relay.signal(signal.SIGTERM)
            self.assertEqual(idle.reply()[:9], "421 4.3.2")
            assert relay.process is not None
            self.assertEqual(relay.process.wait(5.0), 0)
        self.assertEqual(len(relay.files()), 2)

    def test_a_second_relay_on_the_same_spool_says_who_holds_it(self) -> None:
        relay = self.relay()
        assert relay.process is not None
        code, _, errors = relay.run()
        self.assertEqual(code, 75)
        self.assertIn("in use by process %d" % relay.process.pid, errors)

    def test_a_port_in_use_is_told_before_anything_else(self) -> None:
        relay = self.relay()
        other = Relay(tempfile.mkdtemp(dir=self.folder), "127.0.0.1:9")
        other.write_config(relay="[domain x.example]\n")
        with open(other.file, "r+", encoding="utf-8") as file:
            text = file.read().replace("listen = 127.0.0.1:0", "listen = 127.0.0.1:%d" % relay.port)
            file.seek(0)
            file.write(text)
        code, _, errors = other.run()
        self.assertIn(code, (69, 75, 78))
        self.assertIn("cannot listen on 127.0.0.1:%d" % relay.port, errors)

    def test_a_bug_costs_its_session_and_no_other(self) -> None:
        with Local(self.folder) as local:
            with Wire(local.port) as one, Wire(local.port) as two:
                with mock.patch.dict(etrn.COMMANDS, {b"NOOP": (lambda session, text: 1 // 0, etrn.ANY)}):
                    self.assertEqual(one.say("NOOP")[:9], "421 4.3.0")
                self.assertEqual((one.reply(), two.say("NOOP")[:3]), ("", "250"))
            self.assertEqual(sum("bug: " in line for line in local.log), 1)


class Local:
    """The relay in a thread of this process, where its functions can be replaced."""

    def __init__(self, folder: str, relay: str = "", domain: str = "", has_clerk: bool = False) -> None:
        """`has_clerk`: its clerk has what is replaced in etrn_relay now."""
        self.has_clerk = has_clerk
        self.cfg = config("listen = 127.0.0.1:0\nmin_free_space = 0\nnameservers = 127.0.0.1:9\n" + relay,
                          "primary = 127.0.0.1:9\nrecipients = any\ncutthrough = no\n" + domain,
                          os.path.join(folder, "etrn.conf"))
        self.log: List[str] = []

    def __enter__(self) -> "Local":
        self.spool = opened(self.cfg.spool)
        log = etrn.Log("stderr", "info", "x")

        def keep() -> None:
            self.log.extend(log.lines)
            log.lines.clear()
        log.flush = keep                # type: ignore[method-assign]
        self.server = etrn.Server(self.cfg, self.spool, log)
        self.server.manager.committers.clerk = fork_clerk(self.spool) if self.has_clerk else None
        self.server.listen()
        self.server.set_certificate(self.server.load_certificate())
        self.server.load_recipients()
        self.port = self.server.manager.listeners[0].port
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        wait(lambda: self.server.manager.loads and not self.server.manager.is_loading, "the spool to be read")
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.stop()
        self.thread.join(DEADLINE_S)
        self.spool.close()


class Wired(Relays):
    """What the session is shown to do, over a real connection: there the server
    carries its actions out after it has gone on."""

    def exchange(self, local: Local, stream: bytes) -> List[str]:
        """The replies' last lines to all of it in one piece; the client sends no more after that."""
        with Wire(local.port) as wire:
            wire.sock.sendall(stream)
            wire.sock.shutdown(socket.SHUT_WR)
            text = b"".join(iter(functools.partial(wire.sock.recv, 65536), b"")).decode("utf-8")
        return [wire.greeting] + [line for line in text.split("\r\n") if line[3:4] == " "]

    def bodies(self, local: Local) -> List[bytes]:
        """What was kept, without our Received fields, oldest first; it is gone then."""
        ids = sorted(name[:-4] for name in os.listdir(local.spool.path) if name.endswith(".eml"))
        out = []
        for id in ids:
            with open(os.path.join(local.spool.path, id + ".eml"), "rb") as file:
                out.append(without_received(file.read()))
            for kind in (".eml", ".json"):
                os.remove(os.path.join(local.spool.path, id + kind))
        return out

    def test_every_dialogue_comes_out_the_same(self) -> None:
        wanted = [(name, sent, options) for name, sent, options in SCRIPTS if set(options) <= {"bare_newline"}
                  and name != "without a limit any size is taken"]      # the disk's size is one
        self.assertGreater(len(wanted), 100)
        for value in ("normalize", "reject"):
            with Local(self.folder, "max_message_size = 0\nbare_newline = " + value, DIALOGUE_DOMAINS) as local:
                for _, sent, options in cases(self, wanted):
                    if options.get("bare_newline", "normalize") == value:
                        player = play(sent, bare_newline=value)
                        said = self.exchange(local, sent)
                        self.assertEqual([reply[0] for reply in said], [reply[0] for reply in player.replies])
                        self.assertEqual(self.bodies(local), player.bodies)
            self.assertEqual([line for line in local.log if "bug: " in line], [])

    def test_what_is_refused_or_taken_back_in_the_same_breath(self) -> None:
        kept = b"MAIL FROM:<>\r\nRCPT TO:<u@ourdom.example>\r\nBDAT 6 LAST\r\nkept\r\n"
        hops = b"Received: x\r\n" * 101
        with Local(self.folder, "bare_newline = reject\nmax_message_size = 100000") as local:
            for stream, replies in cases(self, [
                    (b"DATA\r\na\nb\r\n.\r\n", ["354", "550 5.6.0"]), (b"BDAT 7 LAST\r\na\nb\r\nxy", ["550 5.6.0"]),
                    (b"DATA\r\n" + hops + b".\r\n", ["354", "554 5.4.6"]),
                    (b"BDAT %d LAST\r\n%s" % (len(hops), hops), ["554 5.4.6"]),
                    (b"BDAT 6\r\nthrownRSET\r\n", ["250", "250 2.0.0"]), (b"BDAT 6\r\nthrownEHLO x\r\n", ["250", "250"]),
                    (b"BDAT 60000\r\n%sBDAT 60000 LAST\r\n%s" % (b"x" * 60000, b"x" * 60000), ["250", "552 5.3.4"])]):
                said = self.exchange(local, OPENING + stream + kept)[4:]
                self.assertEqual([got[:len(want)] for got, want in zip(said, replies)], replies)
                self.assertEqual([reply[:3] for reply in said[len(replies):]], ["250"] * 3)
                self.assertEqual(self.bodies(local), [b"kept\r\n"])
        self.assertEqual([line for line in local.log if "bug: " in line], [])


class Forgetting(Relays):
    def test_nothing_is_remembered_of_mail_that_was_delivered(self) -> None:
        primary = self.primary().start()
        with Local(self.folder, domain="[domain up.example]\nrecipients = any\ncutthrough = no\ntls = none\nprimary = "
                   + primary.address) as local:
            manager = local.server.manager
            with Wire(local.port) as client:
                client.say("EHLO x")
                for _ in range(5):
                    self.assertEqual(client.send(MESSAGE, recipients=["u@up.example"])[:3], "250")
            wait(lambda: not manager.scheduler.messages()[0] and not manager.chains, "all to be delivered")
            self.assertEqual((manager.fresh, manager.chains, manager.waiting), ({}, {}, {}))


class Refusals(Relays):
    def test_the_disk_is_asked_before_mail_is_taken(self) -> None:
        relay = self.relay(relay="")
        relay.end()
        relay.write_config()
        with open(relay.file, encoding="utf-8") as file:
            text = file.read().replace("min_free_space = 0", "min_free_space = 1000000G")
        with open(relay.file, "w", encoding="utf-8") as file:
            file.write(text)
        relay.start()
        with relay.client() as client:
            self.assertEqual(client.say("MAIL FROM:<>")[:9], "452 4.3.1")
            self.assertEqual(client.say("NOOP")[:3], "250")

    def test_errors_of_the_disk_are_temporary_and_keep_nothing(self) -> None:
        with shorten(RETRY_DISK_S=0.05), Local(self.folder) as local:
            for number, reply in cases(self, [(errno.ENOSPC, "452 4.3.1"), (errno.EDQUOT, "452 4.3.1"),
                                              (errno.EMFILE, "451 4.3.0")]):
                with Wire(local.port) as client, mock.patch.object(os, "fsync", side_effect=OSError(number, "x")):
                    client.say("EHLO x")
                    self.assertEqual(client.send(MESSAGE)[:9], reply)
                    self.assertEqual((spool_files(local.spool.path), os.listdir(local.spool.incoming)), ([], []))
            with Wire(local.port) as client:
                client.say("EHLO x")
                with mock.patch.object(os, "fsync", side_effect=OSError(errno.EIO, "x")):
                    self.assertEqual(client.send(MESSAGE)[:9], "451 4.3.0")
                    self.assertEqual(client.say("MAIL FROM:<>")[:9], "451 4.3.0")
                wait(lambda: not local.spool.sick, "the spool to be well")
                self.assertEqual(client.send(MESSAGE)[:3], "250")
            self.assertEqual(len(spool_files(local.spool.path)), 2)

    def test_connections_are_limited_for_one_client_and_for_all(self) -> None:
        for option in cases(self, ["max_connections_per_client = 2", "max_connections = 2"]):
            relay = self.relay(relay=option)
            with relay.client(), relay.client() as second:
                with Wire(relay.port) as third:
                    self.assertEqual((third.greeting[:3], third.reply()), ("421", ""))
                second.say("QUIT")
                second.close()
                self.assertTrue(wait(lambda relay=relay: self.greeted(relay.port), "a place"))

    @staticmethod
    def greeted(port: int) -> bool:
        with Wire(port) as wire:
            return wire.greeting.startswith("220")

    def test_trusted_clients_are_free_of_the_limit(self) -> None:
        relay = self.relay(relay="max_connections_per_client = 1\ntrusted_clients = 127.0.0.0/8")
        with relay.client(), relay.client() as second:
            self.assertEqual(second.say("NOOP")[:3], "250")

    def test_sizes_and_recipients_are_limited_on_the_wire(self) -> None:
        relay = self.relay(relay="max_message_size = 1000\nmax_recipients = 2")
        with relay.client() as client:
            self.assertEqual(client.say("MAIL FROM:<> SIZE=1001")[:9], "552 5.3.4")
            self.assertEqual(client.send(b"x" * 1100 + b"\r\n")[:9], "552 5.3.4")
            client.say("MAIL FROM:<>", "RCPT TO:<a@%s>" % DOMAIN, "RCPT TO:<b@%s>" % DOMAIN)
            self.assertEqual(client.say("RCPT TO:<c@%s>" % DOMAIN)[:9], "452 4.5.3")
        self.assertEqual(relay.files(), [])

    def test_who_is_idle_too_long_is_told_421(self) -> None:
        relay = self.relay(relay="command_timeout = 1s")
        with relay.client() as client, relay.client() as drip:
            client.say("MAIL FROM:<>")
            drip.raw(b"NOO")
            for one in (client, drip):
                self.assertEqual((one.reply()[:3], one.reply()), ("421", ""))

    def test_a_client_that_does_not_read_gets_all_its_replies_later(self) -> None:
        relay = self.relay()
        count = 30000
        with relay.client() as client:
            sender = threading.Thread(target=client.raw, args=(b"NOOP\r\n" * count,), daemon=True)
            sender.start()
            self.assertEqual({client.reply() for _ in range(count)}, {"250 2.0.0 Ok"})
            sender.join(DEADLINE_S)

    def test_rejections_are_logged_for_fail2ban(self) -> None:
        relay = self.relay()
        with relay.client("HELO evil\u2028.example") as client:
            client.say("MAIL FROM:<a@b.example>", "RCPT TO:<x@other.example>")
        relay.logged(r"etrn_relay/smtpd\[\d+\]: NOQUEUE: reject: RCPT from unknown\[127\.0\.0\.1\]: 554 5\.7\.1 "
                     r"<x@other\.example>: Relay access denied;"
                     r" from=<a@b\.example> to=<x@other\.example> proto=SMTP helo=<")


class Etrn(Relays):
    def test_each_reply_of_the_table_on_one_line(self) -> None:
        relay = self.relay("127.0.0.1:%d" % self.primary().port,
                           domain="[domain far.example]\nprimary = 127.0.0.2:%d\n[domain closed.example]\netrn = none\n"
                           "[domain near.example]\netrn = 127.0.0.0/8\n[domain sub.tree.example]\n" % self.primary().port)
        relay.send(recipients=["u@" + DOMAIN, "u@far.example"])
        relay.logged(r"ourdom\.example: down: ")
        relay.logged(r"far\.example: down: ")
        with Wire(relay.port) as client:
            for command, expected in cases(self, [
                    ("ETRN " + DOMAIN, "503 5.5.1"), ("HELO gw", "250"), ("ETRN", "500 5.5.4"), ("ETRN #q", "501 5.5.4"),
                    ("ETRN a..b", "501 5.5.4"),
                    ("ETRN other.example", "459 4.7.1"), ("ETRN example", "459 4.7.1"), ("ETRN @other.example", "459 4.7.1"),
                    ("ETRN closed.example", "459 4.7.1"), ("ETRN tree.example", "459 4.7.1"), ("ETRN @tree.example", "250 2.0.0"),
                    ("ETRN near.example", "250 2.0.0"), ("ETRN far.example", "250 2.0.0"),
                    ("etrn OurDom.Example", "253 2.0.0 OK, 1 pending messages for node ourdom.example started")]):
                reply = client.say(command)
                self.assertTrue(reply.startswith(expected), reply)
                self.assertEqual(len(reply.splitlines()), 1)
            relay.run("--hold", DOMAIN)
            self.assertEqual(client.say("ETRN " + DOMAIN)[:9], "458 4.0.0")
            relay.run("--release", DOMAIN)
            client.say("MAIL FROM:<>")
            self.assertEqual(client.say("ETRN " + DOMAIN)[:9], "503 5.5.1")
        relay.logged(r"flush\[\d+\]: etrn: site=ourdom\.example, client=unknown\[127\.0\.0\.1\], messages=1, reply=253")

    def test_etrn_delivers_at_once(self) -> None:
        primary = self.primary()
        relay = self.relay(primary, domain="probe_interval = 1h", PROBE_FIRST_S=3600.0)
        for _ in range(3):
            relay.send()
        relay.logged(": down: ")
        with relay.client() as client:
            primary.start()
            self.assertIn(client.say("ETRN @" + DOMAIN)[:3], ("250", "253"))
            wait(relay.is_empty, "an empty spool")
            self.assertEqual(client.say("ETRN " + DOMAIN)[:3], "250")

    def test_etrn_makes_deferred_mail_due_and_leaves_held_mail(self) -> None:
        primary = self.primary(RCPT=["450 4.2.0 later", "450 4.2.0 later", "250 ok"]).start()
        relay = self.relay(primary)
        relay.send(sender="held@x.example")
        wait(lambda: primary.uses["RCPT"] == 1)
        held = relay.queue()[0]["id"]
        relay.run("--hold", held)
        relay.send(sender="due@x.example")
        wait(lambda: [row["recipients"][0]["attempts"] for row in relay.queue()] == [1, 1], "both to be deferred")
        with relay.client() as client:
            self.assertEqual(client.say("ETRN " + DOMAIN)[:3], "253")
        wait(lambda: primary.messages, "the mail")
        left = wait(lambda: len(relay.queue()) == 1 and relay.queue(), "one message to remain")
        self.assertEqual(([one[0] for one in primary.messages], left[0]["id"]), (["due@x.example"], held))

    def test_an_etrn_with_smuggled_names_makes_no_file(self) -> None:
        relay = self.relay()
        before = sorted(os.listdir(relay.folder)), sorted(os.listdir(relay.spool))
        with relay.client() as client:
            for name in cases(self, ["../../x", "%2e%2e", "a b", "-x", "*", "@", "@@", "x" * 1500, "ünï..cöde"]):
                self.assertIn(client.say("ETRN " + name)[:3], ("500", "501", "459"))
        self.assertEqual((sorted(os.listdir(relay.folder)), sorted(os.listdir(relay.spool))), before)


# -- TLS

@unittest.skipIf(ssl is None, "this Python has no ssl module")
class Secured(Relays):
    """Tests with certificates: files one.pem, one.key, two.pem and two.key."""

    def setUp(self) -> None:
        super().setUp()
        for name, text in PEMS.items():
            with open(os.path.join(self.folder, name), "w", encoding="ascii") as file:
                file.write(text)

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def install(self, certificate: str = "one", key: str = "") -> None:
        """Put a pair where the relay's is, as a renewal does."""
        for kind, name in (("pem", certificate), ("key", key or certificate)):
            shutil.copy(self.path("%s.%s" % (name, kind)), self.path("new"))
            os.replace(self.path("new"), self.path("relay." + kind))

    def local(self, relay: str = "") -> "Local":
        self.install()
        return Local(self.folder, relay, "[tls]\ncertificate = relay.pem\nkey = relay.key\n")

    def quiet(self, local: "Local") -> None:
        """Nothing that a client did was a bug of ours."""
        self.assertEqual([line for line in local.log if "bug: " in line], [])


class TlsWire(Wire):
    """A client that has said EHLO and, unless it says otherwise, STARTTLS."""

    def __init__(self, port: int, secure: bool = True, **options: Any) -> None:
        super().__init__(port)
        self.say("EHLO client.example")
        if secure:
            assert self.say("STARTTLS")[:3] == "220"
            self.handshake(**options)

    def handshake(self, **options: Any) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        for name, value in options.items():
            setattr(context, name, value)
        self.lines.close()
        self.sock = context.wrap_socket(self.sock)
        self.lines = self.sock.makefile("rb")

    @property
    def certificate(self) -> bytes:
        return self.sock.getpeercert(True)      # type: ignore[attr-defined,no-any-return]

    def rest(self) -> bytes:
        """All that still comes until the relay closes."""
        try:
            return self.lines.read()
        except OSError:
            return b""


class TlsClients(Secured):
    def test_a_session_over_tls_is_shown_in_received_and_sidecar(self) -> None:
        with self.local() as local, TlsWire(local.port, secure=False) as client:
            self.assertIn("STARTTLS", client.say("EHLO client.example").replace("250-", "").split("\n"))
            client.say("STARTTLS")
            client.handshake()
            self.assertEqual(client.say("MAIL FROM:<>")[:9], "503 5.5.1")
            self.assertNotIn("STARTTLS", client.say("EHLO again.example"))
            self.assertEqual(client.say("STARTTLS")[:9], "503 5.5.1")
            id = client.send(MESSAGE).split()[-1]
            version = client.sock.version()     # type: ignore[attr-defined]
            sidecar = local.spool.read_sidecar(id)
            self.assertEqual(sidecar["client"], {"address": "127.0.0.1", "helo": "again.example", "tls": version})
            self.assertIn(version, ("TLSv1.2", "TLSv1.3"))
            header = local.spool.read_header(id).decode()
            self.assertRegex(header, r"\AReceived: from again\.example \(unknown \[127\.0\.0\.1\]\)\r\n"
                             r"\t\(using %s with cipher [A-Z0-9_-]+\)\r\n\tby .* with ESMTPS id %s\r\n" % (version, id))
            self.quiet(local)

    def test_what_comes_behind_starttls_in_the_clear_ends_the_session(self) -> None:
        with self.local() as local:
            for injected in cases(self, [b"NOOP\r\n", b"RSET\r\nMAIL FROM:<a@b.example>\r\n", b"\r\n", b"\x16\x03\x01", b"x",
                                         b"QUIT\r\n" * 3000]):
                for ahead in (b"", b"NOOP\r\n"):
                    with TlsWire(local.port, secure=False) as client:
                        client.raw(ahead + b"STARTTLS\r\n" + injected)
                        replies = [client.reply()[:9] for _ in range(2 if ahead else 1)]
                        self.assertEqual((replies[-1], client.rest()), ("501 5.5.1", b""))
            self.quiet(local)

    def test_what_comes_in_the_clear_after_the_220_is_never_a_command(self) -> None:
        with self.local() as local:
            for injected in cases(self, [b"NOOP\r\n", b"MAIL FROM:<a@b.example>\r\n" * 50]):
                with TlsWire(local.port, secure=False) as client:
                    client.say("STARTTLS")
                    client.raw(injected)
                    with contextlib.suppress(OSError, ValueError):      # the alert of a failed handshake, or nothing
                        self.assertNotRegex(client.rest(), rb"(?m)^[245]\d\d ")
            self.assertEqual(spool_files(local.spool.path), [])
            self.quiet(local)

    def test_all_that_was_said_before_tls_is_forgotten(self) -> None:
        with self.local() as local:
            for before in cases(self, [["MAIL FROM:<a@b.example>", "RSET"], ["NOOP"]]):
                with TlsWire(local.port, secure=False) as client:
                    client.say(*before, "STARTTLS")
                    client.handshake()
                    for command in ("RCPT TO:<u@%s>" % DOMAIN, "DATA", "MAIL FROM:<a@b.example>", "ETRN " + DOMAIN):
                        self.assertEqual(client.say(command)[:9], "503 5.5.1")
            for begun in cases(self, [[], ["BDAT 8\r\nthrown"]]):
                with TlsWire(local.port, secure=False) as client:
                    client.say("MAIL FROM:<a@b.example>", "RCPT TO:<u@%s>" % DOMAIN, *begun)
                    self.assertEqual(client.say("STARTTLS")[:9], "220 2.0.0")
                    client.handshake()
                    self.assertEqual(client.say("EHLO x", "DATA")[:9], "503 5.5.1")
                    self.assertEqual(client.send(MESSAGE)[:3], "250")
                id = sorted(name[:-4] for name in spool_files(local.spool.path) if name.endswith(".eml"))[-1]
                with open(os.path.join(local.spool.path, id + ".eml"), "rb") as file:
                    self.assertEqual(without_received(file.read()), MESSAGE)

    def test_errors_before_tls_still_count(self) -> None:
        with self.local() as local, TlsWire(local.port, secure=False) as client:
            client.say(*["WHAT"] * 10, "STARTTLS")
            client.handshake()
            self.assertEqual((client.say("WHAT")[:9], client.rest()), ("421 4.7.0", b""))

    def test_starttls_with_an_argument_and_where_it_is_not_configured(self) -> None:
        with self.local() as local, TlsWire(local.port, secure=False) as client:
            self.assertEqual(client.say("STARTTLS now")[:9], "501 5.5.4")
            self.assertEqual(client.say("NOOP")[:3], "250")
        with Local(os.path.join(self.folder, "other")) as local, TlsWire(local.port, secure=False) as client:
            self.assertNotIn("STARTTLS", client.say("EHLO x"))
            self.assertEqual(client.say("STARTTLS")[:9], "502 5.5.1")

    def test_a_handshake_that_fails_or_stalls_costs_its_own_session_alone(self) -> None:
        with shorten(HANDSHAKE_S=0.3, SWEEP_S=0.05), self.local() as local, TlsWire(local.port) as good:
            for said in cases(self, [b"SOMEFAILINGHANDSHAKE\r\n", b"\x16\x03\x01\x40\x00" + b"\0" * 50,
                                     b"\x15\x03\x03\x00\x02\x02\x28", None, b"", b"\x16\x03"]):
                with TlsWire(local.port, secure=False) as client:
                    client.say("STARTTLS")
                    if said is None:
                        client.sock.shutdown(socket.SHUT_WR)
                    else:
                        client.raw(said)
                    began = time.monotonic()
                    self.assertEqual(good.say("NOOP")[:3], "250")
                    self.assertNotRegex(client.rest(), rb"(?m)^[245]\d\d ")
                    self.assertLess(time.monotonic() - began, 5.0)
            wait(lambda: len(local.server.connections) == 1, "the others to be gone")
            self.quiet(local)

    def test_stalled_handshakes_hold_nobody_up(self) -> None:
        with self.local() as local, contextlib.ExitStack() as stack:
            for number in range(40):
                client = stack.enter_context(TlsWire(local.port, secure=False))
                client.say("STARTTLS")
                client.raw(b"\x16\x03\x01\x02\x00\x01"[:number % 7])
            began = time.monotonic()
            with TlsWire(local.port) as good:
                good.say("EHLO x")
                self.assertEqual(good.send(MESSAGE)[:3], "250")
            self.assertLess(time.monotonic() - began, 10)

    def test_who_does_not_even_read_our_220_is_dropped(self) -> None:
        class Stuffed(socket.socket):
            def send(self, data: Any, flags: int = 0) -> int:
                raise BlockingIOError
        self.install()
        local = self.local()
        spool = opened(local.cfg.spool)
        self.addCleanup(spool.close)
        server = etrn.Server(local.cfg, spool, etrn.Log("stderr", "error", "x"))
        server.set_certificate(server.load_certificate())
        ours, theirs = socket.socketpair()
        with theirs:
            server._welcome(Stuffed(fileno=ours.detach()), "192.0.2.7")
            connection, = server.connections
            server._act(connection, connection.session.receive(b"STARTTLS\r\n"))
            self.assertIs(connection.tls, etrn.Tls.ASKED)
            server._sweep()
            self.assertEqual(server.connections, {connection})
            server.now = etrn.Now(server.now.mono + etrn.HANDSHAKE_S + 1, server.now.wall)
            server._sweep()
            self.assertEqual(server.connections, set())
        server._close()

    def test_old_protocols_are_refused(self) -> None:
        with self.local() as local:
            for version in cases(self, ["TLSv1", "TLSv1_1"]):
                with TlsWire(local.port, secure=False) as client:
                    client.say("STARTTLS")
                    with self.assertRaises(OSError), warnings.catch_warnings():
                        warnings.simplefilter("ignore", DeprecationWarning)
                        old = ssl.TLSVersion[version]
                        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                        context.set_ciphers("DEFAULT:@SECLEVEL=0")
                        context.minimum_version = context.maximum_version = old
                        context.wrap_socket(client.sock)
            wait(lambda: sum("TLS handshake failed" in line for line in local.log) == 2, "both refusals in the log")
            for version in cases(self, ["TLSv1_2", "TLSv1_3"]):
                with TlsWire(local.port, maximum_version=ssl.TLSVersion[version]) as client:
                    self.assertEqual(client.sock.version(), version.replace("_", "."))      # type: ignore[attr-defined]
                    self.assertEqual(client.say("NOOP")[:3], "250")

    @unittest.skipUnless(shutil.which("openssl"), "no openssl program")
    def test_openssl_s_client_talks_and_cannot_renegotiate(self) -> None:
        with self.local() as local:
            context = local.server.load_certificate().context       # type: ignore[union-attr]
            self.assertTrue(context.options & getattr(ssl, "OP_NO_RENEGOTIATION", 0x40000000))
            for commands, expected in cases(self, [(b"EHLO x\nnoop\nquit\n", rb"221 2\.0\.0"),
                                                   (b"R\n", rb"RENEGOTIATING\n[^\n]*error:")]):
                client = subprocess.Popen(["openssl", "s_client", "-starttls", "smtp", "-tls1_2", "-connect",
                                           "127.0.0.1:%d" % local.port], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                          stderr=subprocess.STDOUT)
                assert client.stdin is not None and client.stdout is not None
                with client.stdin, client.stdout:
                    said = b""
                    while b"LIMITS" not in said:        # what was offered in the clear: from now on what is typed is sent
                        said += client.stdout.readline()
                    client.stdin.write(commands)
                    client.stdin.flush()
                    self.assertRegex(said + client.stdout.read(), expected)
                    client.wait(DEADLINE_S)
            self.quiet(local)

    def test_a_renewed_certificate_is_used_and_a_broken_one_is_not(self) -> None:
        def shown() -> bytes:
            with TlsWire(local.port) as client:
                self.assertEqual(client.say("NOOP")[:3], "250")
                return client.certificate
        pems = {name: ssl.PEM_cert_to_DER_cert(PEMS[name + ".pem"]) for name in ("one", "two")}
        with self.local() as local:
            self.assertEqual(shown(), pems["one"])
            self.install("two")
            self.assertEqual(shown(), pems["two"])
            for text in cases(self, [PEMS["one.pem"], PEMS["one.pem"][:200], "", "-----BEGIN CERTIFICATE-----\n"]):
                with open(self.path("relay.pem"), "w", encoding="ascii") as file:
                    file.write(text)            # not the key's, half written, empty
                for _ in range(3):
                    self.assertEqual(shown(), pems["two"])
            os.unlink(self.path("relay.key"))
            self.assertEqual((shown(), shown()), (pems["two"], pems["two"]))
            self.install("one")
            self.assertEqual(shown(), pems["one"])
            said = [line.partition("]: ")[2][:45].strip() for line in local.log if "certificate" in line]
            self.assertEqual(said, ["certificate renewed"] + ["warning: the certificate cannot be read, the"] * 5
                             + ["certificate renewed"])

    def test_a_key_with_a_password_is_refused_not_asked_for(self) -> None:
        with open(self.path("one.key"), "w", encoding="ascii") as file:
            file.write(LOCKED_KEY)
        with self.assertRaisesRegex(OSError, "^"), mock.patch("getpass.getpass", side_effect=AssertionError):
            etrn.Certificate(self.path("one.pem"), self.path("one.key"))

    def test_sighup_takes_a_new_certificate_and_refuses_a_bad_one(self) -> None:
        self.install()
        section = "[tls]\ncertificate = %s\nkey = %s\n" % (self.path("relay.pem"), self.path("relay.key"))
        relay = self.relay(domain=section)
        with TlsWire(relay.port, secure=False) as early:
            relay.write_config(domain=section.replace("relay.", "absent."))
            relay.signal(signal.SIGHUP)
            relay.logged("not reloaded, the old configuration stays: certificate ")
            with TlsWire(relay.port) as client:
                self.assertEqual(client.say("NOOP")[:3], "250")
            with open(self.path("relay.pem"), "w", encoding="ascii") as file:
                file.write("half")
            relay.write_config(domain=section)
            relay.signal(signal.SIGHUP)
            relay.logged("certificate .*; the old one stays")
            relay.logged("configuration reread")
            with TlsWire(relay.port) as client:
                self.assertEqual(client.say("NOOP")[:3], "250")
            relay.write_config(domain="")
            since = len(relay.log)
            relay.signal(signal.SIGHUP)
            relay.logged("configuration reread", since)
            with TlsWire(relay.port, secure=False) as client:
                self.assertEqual(client.say("STARTTLS")[:3], "502")
            self.assertEqual(early.say("STARTTLS")[:3], "220")      # what was offered holds
            early.handshake()
            self.assertEqual(early.say("NOOP")[:3], "250")
        relay.end()
        relay.write_config(domain=section)
        status, _, error = relay.run()
        self.assertEqual((status, "relay.pem" in error), (etrn.EX_CONFIG, True))

    def test_what_lies_in_the_tls_layer_is_not_forgotten(self) -> None:
        """A record of many commands, read in small pieces, and reading paused by a client that does not read."""
        count = 2000                    # one record: no other comes to wake the relay
        with shorten(COMMAND_OCTETS=64, OUTPUT_MAX=256), self.local() as local, TlsWire(local.port) as client:
            client.raw(b"NOOP\r\n" * count)
            self.assertEqual([client.reply()[:3] for _ in range(count)], ["250"] * count)
            client.say("EHLO x")
            body = b"x" * 70 + b"\r\n"
            opening = b"MAIL FROM:<>\r\nRCPT TO:<u@%s>\r\n" % DOMAIN.encode()
            client.raw(opening + b"DATA\r\n" + body * 100 + b".\r\nNOOP\r\n"
                       + opening + b"BDAT 7200 LAST\r\n" + body * 100 + b"NOOP\r\n" * 50)
            self.assertEqual([client.reply()[:3] for _ in range(58)],
                             ["250", "250", "354"] + ["250"] * 55)
            self.assertEqual(len(spool_files(local.spool.path)), 4)
            wait(lambda: not local.server.decrypted, "nothing to be left")

    def test_a_large_message_over_tls_waits_for_a_slow_disk(self) -> None:
        append = etrn.Spool.append

        def slowly(*arguments: Any) -> None:
            time.sleep(0.02)
            append(*arguments)
        with shorten(UNWRITTEN_MAX=20000, SPILL_OCTETS=10000), mock.patch.object(etrn.Spool, "append", slowly):
            with self.local() as local, TlsWire(local.port) as client:
                client.say("EHLO x")
                data = b"".join(b"%06d %s\r\n" % (number, b"y" * 60) for number in range(6000))
                id = client.send(data).split()[-1]
                self.assertEqual(client.say("NOOP")[:3], "250")
                with open(os.path.join(local.spool.path, id + ".eml"), "rb") as file:
                    self.assertEqual(without_received(file.read()), data)

    def test_smuggling_vectors_within_tls(self) -> None:
        with self.local() as local, TlsWire(local.port) as client:
            client.say("EHLO x")
            for vector in cases(self, VECTORS):
                reply = client.say("MAIL FROM:<>", "RCPT TO:<u@%s>" % DOMAIN, "DATA")
                self.assertEqual(reply[:3], "354")
                for part in (b"x", vector, EVIL, b"\r\n.", b"\r\n"):
                    client.raw(part)
                self.assertEqual((client.reply()[:3], client.say("NOOP")[:3]), ("250", "250"))
            self.assertEqual(len(spool_files(local.spool.path)), 2 * len(VECTORS))


class SecurePrimary(Primary):
    """A scripted primary that offers STARTTLS.  Script verbs of its own: "STARTTLS", and "TLS", said instead of a handshake."""

    def __init__(self, certificate: str, **script: Any) -> None:
        super().__init__(**script)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate, certificate.replace(".pem", ".key"))
        self.connections = 0
        self.secured = 0
        self.greeted: List[Any] = []

    def _serve(self, sock: socket.socket) -> None:
        self.connections += 1
        try:
            with sock, sock.makefile("rb") as lines:
                self._say(sock, "greeting", "", "220 primary.example ESMTP")
                self.greeted.append(sock)
                for line in lines:
                    verb = line.upper().strip()
                    if verb.startswith(b"EHLO"):
                        sock.sendall(b"250-primary.example\r\n250-PIPELINING\r\n250 STARTTLS\r\n")
                    elif verb == b"STARTTLS":
                        said = self._say(sock, "STARTTLS", "", "220 2.0.0 go")
                        if "TLS" in self.script:
                            self._say(sock, "TLS", "", "")
                        elif said == "2":
                            return self._secure(sock)
                    else:
                        return self._talk(sock, itertools.chain([line], lines))     # type: ignore[arg-type]
        except (OSError, ValueError):
            pass

    def _secure(self, sock: socket.socket) -> None:
        secure = self.context.wrap_socket(sock, server_side=True)
        self.clients.append(secure)
        self.secured += 1
        self.greeted.append(secure)
        with secure, secure.makefile("rb") as lines:
            self._talk(secure, lines)

    def _say(self, sock: socket.socket, verb: str, *rest: Any) -> str:
        return "2" if verb == "greeting" and sock in self.greeted else super()._say(sock, verb, *rest)


class TlsPrimaries(Secured):
    """The `tls` option of a domain."""

    def primary(self, **script: Any) -> SecurePrimary:
        primary = SecurePrimary(self.path("one.pem"), **script)
        self.addCleanup(primary.__exit__)
        primary.start()
        return primary

    def deliver(self, primary: Primary, policy: str) -> Tuple[str, str]:
        """What became of a message, and how the connection ended."""
        spool = opened(os.path.join(self.folder, "spool-%d" % primary.port))
        self.addCleanup(spool.close)
        self.assertIsNone(store(spool, "ABC123"))
        cfg = config("", "primary = localhost:%d\ntls = %s" % (primary.port, policy)).domain(DOMAIN)
        reports: List[Any] = []
        courier = etrn.Courier(spool, make_plan(cfg, (etrn.Endpoint("127.0.0.1", primary.port),)), reports.append)
        courier.jobs["ABC123"] = mock.sentinel.entry
        courier.inbox.put(etrn.Job("ABC123", DOMAIN))
        courier.inbox.put(None)
        courier.start()
        courier.join(DEADLINE_S)
        self.assertIsNone(reports[-1].bug)
        kinds = [result.kind for one in reports if isinstance(one, etrn.Outcome) for result in one.results]
        return " ".join(kinds), reports[-1].error

    def test_each_policy_with_a_primary_that_offers_tls(self) -> None:
        pin = hashlib.sha256(ssl.PEM_cert_to_DER_cert(PEMS["one.pem"])).hexdigest()
        for policy, trusted, kind, secured, error in cases(self, [
                ("none", "", "sent", 0, ""), ("may", "", "sent", 1, ""), ("require", "", "sent", 1, ""),
                ("verify", "one", "sent", 1, ""), ("verify", "", "", 0, "TLS with .* failed"),
                ("verify", "two", "", 0, "TLS with .* failed"), ("sha256:" + pin, "", "sent", 1, ""),
                ("sha256:" + ":".join(re.findall("..", pin.upper())), "", "sent", 1, ""),
                ("sha256:" + "00" * 32, "", "", 1, "is not the pinned one: sha256:" + pin)]):
            primary = self.primary()
            store_of_trust = {"SSL_CERT_FILE": self.path(trusted + ".pem"), "SSL_CERT_DIR": self.path("none")}
            with mock.patch.dict(os.environ, store_of_trust):
                got, problem = self.deliver(primary, policy)
            self.assertEqual((got, primary.connections, len(primary.messages)), (kind, 1, 1 if kind else 0), problem)
            self.assertRegex(problem, error if error else r"\A\Z")
            if kind:
                self.assertEqual(primary.secured, secured)
            primary.stop()

    def test_only_may_goes_on_in_the_clear_and_on_a_new_connection(self) -> None:
        faults: List[Dict[str, Any]] = [
            {"STARTTLS": "454 4.7.0 not now"}, {"STARTTLS": "500 5.5.1 what?"}, {"STARTTLS": CUT}, {"TLS": "no ServerHello"},
            {"TLS": CUT}, {"STARTTLS": b"220 go\r\n250 INJECTED\r\n", "TLS": CUT}]
        for fault, policy in cases(self, itertools.product(faults, ("may", "require", "verify", "sha256:" + "00" * 32))):
            primary = self.primary(**fault)
            got, error = self.deliver(primary, policy)
            if policy == "may":
                self.assertEqual((got, error, primary.connections, primary.secured), ("sent", "", 2, 0))
            else:
                self.assertEqual((got, primary.messages, primary.secured), ("", [], 0))
                self.assertTrue(error)
            self.assertNotIn("INJECTED", error)
            primary.stop()

    def test_a_primary_without_starttls_gets_mail_in_the_clear_only_where_that_may_be(self) -> None:
        for policy, kind in cases(self, [("none", "sent"), ("may", "sent"), ("require", ""), ("verify", ""),
                                         ("sha256:" + "00" * 32, "")]):
            primary = Primary().start()
            self.addCleanup(primary.__exit__)
            got, error = self.deliver(primary, policy)
            self.assertEqual((got, "does not offer STARTTLS" in error), (kind, not kind))

    def test_mail_waits_for_a_primary_whose_tls_is_broken_and_is_not_returned(self) -> None:
        primary = self.primary(TLS=CUT)
        relay = self.relay(primary, domain="tls = require\nlifetime = 1h")
        relay.send()
        relay.logged(r"ourdom\.example: down: TLS with .* failed")
        self.assertEqual(len(relay.queue()), 1)
        del primary.script["TLS"]
        wait(relay.is_empty, "the mail to be delivered")
        self.assertEqual((len(primary.messages), primary.secured > 0), (1, True))


# -- attacks

class Conversations(Secured):
    """Of the client with a peer that is slow, or leaves."""

    def pair(self, has_tls: bool) -> Tuple[etrn.Client, socket.socket]:
        """Connected, with buffers so small that a large message does not fit."""
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            sock = etrn.begin_connect(etrn.Hop("peer.example", "127.0.0.1", listener.getsockname()[1]))
            peer, _ = listener.accept()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        peer.settimeout(DEADLINE_S)
        client = etrn.Client("backup.example.net")
        client._host = "peer.example"       # type: ignore[attr-defined]
        client.sock = sock
        if has_tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.path("one.pem"), self.path("one.key"))
            client.esmtp_features = {"starttls": ""}
            with mock.patch.object(client, "ask_tls", return_value=(220, b"")), mock.patch.object(client, "hello"), \
                    concurrent.futures.ThreadPoolExecutor(1) as pool:
                secured = pool.submit(context.wrap_socket, peer, server_side=True)
                client.secure("require")
                peer = secured.result()
        self.addCleanup(client.close)
        self.addCleanup(peer.close)
        return client, peer

    def test_a_peer_that_reads_slowly_gets_all_of_it_and_is_heard(self) -> None:
        data = bytes(range(256)) * 4000
        for has_tls in cases(self, [False, True]):
            client, peer = self.pair(has_tls)
            got: List[bytes] = []

            def read(peer: socket.socket = peer, got: List[bytes] = got) -> None:
                while sum(map(len, got)) < len(data):
                    got.append(peer.recv(3000))
                for piece in (b"2", b"50-a\r", b"\n250 ", b"b\r\n"):
                    peer.sendall(piece)
            thread = threading.Thread(target=read, daemon=True)
            thread.start()
            client.write(data, DEADLINE_S)
            client.wait(DEADLINE_S)
            self.assertEqual(client.getreply(), (250, b"a\nb"))
            thread.join(DEADLINE_S)
            self.assertEqual(b"".join(got), data)
            self.assertGreater(len(got), 200)
            self.assertTrue(client.is_silent())         # tickets of TLS are no traffic
            peer.close()
            wait(lambda client=client: not client.is_silent(), "the end to be noticed")

    def test_a_peer_that_stops_reading_or_answering_is_left_after_its_time(self) -> None:
        for has_tls, act in cases(self, itertools.product([False, True], [
                lambda client: client.write(b"x" * 5000000, 0.2), lambda client: (client.wait(0.2), client.getreply())])):
            client, peer = self.pair(has_tls)
            began, used = time.monotonic(), time.process_time()
            with self.assertRaises(etrn.PeerError) as caught:
                act(client)
            self.assertEqual(str(caught.exception), "conversation with peer.example timed out")
            self.assertTrue(0.15 < time.monotonic() - began < DEADLINE_S / 2)
            self.assertLess(time.process_time() - used, 0.15, "it waits without turning")
            peer.close()

    def test_a_peer_that_leaves_while_it_is_written_to_is_noticed_at_once(self) -> None:
        for has_tls in cases(self, [False, True]):
            client, peer = self.pair(has_tls)

            def leave(peer: socket.socket = peer) -> None:
                peer.recv(1000)
                peer.close()
            thread = threading.Thread(target=leave, daemon=True)
            thread.start()
            with self.assertRaises(etrn.PeerError) as caught:
                client.write(b"x" * 5000000, DEADLINE_S)
            self.assertRegex(str(caught.exception), r"\Alost connection with peer\.example: ")
            thread.join(DEADLINE_S)

    def test_what_is_cut_ends_whatever_it_waits_for(self) -> None:
        for has_tls, act in cases(self, itertools.product([False, True], [
                lambda client: client.write(b"x" * 5000000, DEADLINE_S),
                lambda client: (client.wait(DEADLINE_S), client.getreply())])):
            client, _ = self.pair(has_tls)
            line = mock.Mock(client=client)
            polled = threading.Event()
            shim = types.SimpleNamespace(**dict(vars(select), poll=lambda polled=polled: (polled.set(), select.poll())[1]))

            def cut(polled: threading.Event = polled, line: Any = line) -> None:
                polled.wait(DEADLINE_S)
                etrn.Line.cut(line)
            thread = threading.Thread(target=cut, daemon=True)
            thread.start()
            began = time.monotonic()
            with mock.patch.object(etrn, "select", shim):
                self.assertRaises(etrn.PeerError, act, client)
            self.assertLess(time.monotonic() - began, DEADLINE_S / 2)
            thread.join(DEADLINE_S)


def memory_of(pid: int) -> int:
    """Octets in RAM; 0 where the system does not say."""
    try:
        with open("/proc/%d/statm" % pid, encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def processor_time_of(pid: int) -> float:
    with open("/proc/%d/stat" % pid, encoding="ascii") as file:
        return sum(map(int, file.read().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")


LONG = float(os.environ.get("ETRN_RELAY_LONG", "1"))    # so many times longer the fuzz runs, and more clients attack


class Attacks(Relays):
    def opened(self, relay: Relay, count: int) -> List[socket.socket]:
        """Connections that were greeted."""
        socks = [socket.create_connection(("127.0.0.1", relay.port), DEADLINE_S) for _ in range(count)]
        for sock in socks:
            self.addCleanup(sock.close)
            self.assertRegex(b"".join(iter(functools.partial(sock.recv, 1), b"\n")), rb"\A220 [^\r]+\r\Z")
        return socks

    def timed_message(self, relay: Relay) -> float:
        began = time.monotonic()
        self.assertEqual(relay.send()[:3], "250")
        return time.monotonic() - began

    def test_hundreds_of_slow_clients_hold_nobody_up(self) -> None:
        count = min(900, int(250 * LONG))
        relay = self.relay(relay="max_connections_per_client = 0")
        socks = self.opened(relay, count)
        for number, sock in enumerate(socks):   # each stops at another point of the dialogue
            sock.sendall([b"", b"EH", OPENING, OPENING + b"DATA\r\nx", OPENING + b"BDAT 100000\r\nx"][number % 5])
        wait(lambda: relay.json("--status")["connections"] == count, "all to be connected")
        assert relay.process is not None
        used = processor_time_of(relay.process.pid)
        self.assertLess(min(self.timed_message(relay) for _ in range(5)), 1.0)
        time.sleep(0.5)                 # nothing happens in it, which is what is measured
        self.assertLess(processor_time_of(relay.process.pid) - used, 0.4)

    def test_floods_are_answered_and_hold_nobody_up(self) -> None:
        relay = self.relay()
        opening = b"EHLO x\r\nMAIL FROM:<>\r\n"
        floods = [b"NOOP\r\n", b"RSET\r\n", b"EHLO x\r\n", b"VRFY x\r\n", b"HELP\r\n", b"RCPT TO:<u@other.example>\r\n",
                  b"RCPT TO:<u@ourdom.example>\r\n", b"RSET\r\nETRN ourdom.example\r\n", b"RSET\r\nMAIL FROM:<>\r\n"]
        socks = self.opened(relay, len(floods))
        stop = threading.Event()

        def flood() -> None:
            left = {sock: opening + line * 1000 for sock, line in zip(socks, floods)}
            lines = dict(zip(socks, floods))
            for sock in socks:
                sock.setblocking(False)
            while not stop.is_set():
                readable, writable, _ = select.select(socks, socks, [], 1.0)
                for sock in readable:
                    counts[sock] += sock.recv(65536).count(b"\n")
                for sock in writable:
                    left[sock] = left[sock][sock.send(left[sock]):] or lines[sock] * 1000
        counts: Dict[socket.socket, int] = collections.Counter()
        thread = threading.Thread(target=flood, daemon=True)
        thread.start()
        try:
            wait(lambda: all(counts[sock] > 200 for sock in socks), "replies to each flood")
            self.assertLess(min(self.timed_message(relay) for _ in range(5)), 2.0)
        finally:
            stop.set()
            thread.join(DEADLINE_S)
        assert relay.process is not None
        self.assertLess(memory_of(relay.process.pid), 200 << 20)
        unknown, = self.opened(relay, 1)
        with contextlib.suppress(OSError):
            unknown.sendall(b"WHAT\r\n" * 100000)
        self.assertIn(b"421 4.7.0", b"".join(iter(lambda: self.read(unknown), b"")))

    @staticmethod
    def read(sock: socket.socket) -> bytes:
        try:
            return sock.recv(65536)
        except OSError:
            return b""

    def test_clients_that_never_read_cost_little_and_are_cut_off(self) -> None:
        relay = self.relay(relay="command_timeout = 1s", LINGER_S=0.3)
        assert relay.process is not None
        before = memory_of(relay.process.pid)
        socks = self.opened(relay, 10)
        for sock in socks:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                for _ in range(2000):
                    sock.send(b"HELP\r\n" * 1000)
        self.assertLess(min(self.timed_message(relay) for _ in range(3)), 2.0)
        self.assertLess(memory_of(relay.process.pid) - before, 30 << 20)
        wait(lambda: relay.json("--status")["connections"] == 0, "them to be cut off")

    def test_slow_loris_is_cut_off_at_every_stage(self) -> None:
        relay = self.relay(relay="command_timeout = 1s")
        opening = b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<u@ourdom.example>\r\n"
        stages = [b"", b"EHLO x\r\nNO", opening + b"DATA\r\n", opening + b"BDAT 99999\r\n", b"EHLO x\r\nBDAT 99999\r\n",
                  b"EHLO x\r\n" + b"z" * 5000, opening + b"DATA\r\nSubject: "]
        drips = [b"", b"x", b"x", b"x", b"x", b"x", b"\0"]
        socks = self.opened(relay, len(stages))
        for sock, stage in zip(socks, stages):
            sock.sendall(stage)
        ended: Dict[socket.socket, bytes] = {}
        said: Dict[socket.socket, bytes] = collections.defaultdict(bytes)

        def drip() -> bool:
            time.sleep(0.05)
            for sock, octet in zip(socks, drips):
                if sock in ended:
                    continue
                with contextlib.suppress(OSError):
                    sock.sendall(octet)
                while select.select([sock], [], [], 0)[0]:
                    data = self.read(sock)
                    said[sock] += data
                    if not data:
                        ended[sock] = said[sock]
                        break
            return len(ended) == len(socks)
        wait(drip, "all to be cut off")
        for sock in cases(self, socks):
            self.assertIn(b"421 4.4.2", ended[sock])
        self.assertEqual((relay.files(), os.listdir(os.path.join(relay.spool, "incoming"))), ([], []))

    def test_endless_lines_headers_and_data_take_no_memory(self) -> None:
        relay = self.relay(relay="max_message_size = 2M")
        assert relay.process is not None
        relay.send()
        before = memory_of(relay.process.pid)
        block = b"y" * 65536
        opening = "MAIL FROM:<>", "RCPT TO:<u@%s>" % DOMAIN
        for start, part, closes in cases(self, [("", block, False), ("DATA", block, True), ("DATA", b"X-Y: z\r\n" * 8192, True),
                                                ("DATA", b"\r\n" * 32768, True), ("BDAT 2100000", block, False),
                                                ("DATA", b"\0" * 65536, True), ("DATA", b"\r\n..\r\n." * 8192, True)]):
            with relay.client() as client:
                if start:
                    client.say(*opening)
                    client.raw(start.encode() + b"\r\n")
                with contextlib.suppress(OSError):
                    for _ in range(120 if closes else 32):
                        client.raw(part)
                if closes:
                    client.sock.settimeout(DEADLINE_S)
                    with contextlib.suppress(OSError):          # our 552, unless the reset came before it
                        self.assertIn(client.reply()[:3], ("354", "552"))
                else:
                    client.raw(b"\r\nNOOP\r\n" if not start else b"y" * (2100000 - 32 * 65536 if 2100000 > 32 * 65536 else 0))
                    if not start:
                        self.assertEqual((client.reply()[:9], client.reply()[:3]), ("500 5.5.2", "250"))
            self.assertLess(memory_of(relay.process.pid) - before, 24 << 20)
        self.assertEqual(relay.send()[:3], "250")
        self.assertEqual(len(relay.files()), 6)        # two small ones, and that of 2,100,000 octets
        wait(lambda: os.listdir(os.path.join(relay.spool, "incoming")) == [], "nothing to be half kept")

    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "no /proc")
    def test_out_of_descriptors_new_clients_are_turned_away_and_the_loop_rests(self) -> None:
        import resource
        relay = self.relay(relay="max_connections_per_client = 0")
        assert relay.process is not None
        pid = relay.process.pid
        held = self.opened(relay, 5)
        hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
        highest = max(map(int, os.listdir("/proc/%d/fd" % pid)))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 4, hard))
        late = [socket.create_connection(("127.0.0.1", relay.port), DEADLINE_S) for _ in range(20)]
        for sock in late:
            self.addCleanup(sock.close)
        said = [self.read(sock)[:4] for sock in late]
        self.assertEqual(set(said), {b"220 ", b"421 "})
        self.assertGreaterEqual(said.count(b"421 "), 10)
        for _ in range(2):              # whoever finds out why is served with the reserve
            self.assertGreaterEqual(relay.json("--status")["connections"], 5)
        used = processor_time_of(pid)
        with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
            for sock in (first, second):
                sock.connect(os.path.join(relay.spool, "control"))
            time.sleep(0.5)             # the loop must have nothing to do
        self.assertLess(processor_time_of(pid) - used, 0.2)
        held[0].sendall(b"NOOP\r\n")    # who is in is served
        self.assertIn(b"250 2.0.0", b"".join(iter(lambda: held[0].recv(1), b"\n")))
        for sock in [*held, *late]:
            sock.close()
        wait(lambda: self.greeted(relay.port), "room for a new client")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
        self.assertEqual(relay.send()[:3], "250")
        self.assertEqual([line for line in relay.log if "bug: " in line], [])

    @staticmethod
    def greeted(port: int) -> bool:
        with Wire(port) as wire:
            return wire.greeting.startswith("220")

    @contextlib.contextmanager
    def short_of_descriptors(self, relay: str = "") -> Iterator[Tuple[Local, List[int]]]:
        """A relay whose listeners fail as long as there are errors in the list."""
        failures: List[int] = []
        real = socket.socket.accept
        with shorten(SWEEP_S=0.05), Local(self.folder, relay) as local:
            listeners = {*local.server.listeners.values(), *local.server.odmr_listeners.values()}

            def accept(sock: socket.socket) -> Any:
                if failures and sock in listeners:
                    raise OSError(failures.pop(), "none left")
                return real(sock)
            with mock.patch.object(socket.socket, "accept", accept):
                yield local, failures

    @staticmethod
    def rests(local: Local) -> int:
        return sum("out of file descriptors" in line for line in local.log)

    def test_a_listener_rests_when_a_thread_has_the_reserve(self) -> None:
        with self.short_of_descriptors("odmr_listen = 127.0.0.1:0\n") as (local, failures):
            for where in cases(self, local.server.manager.listeners):
                was = self.rests(local)
                failures += [errno.EMFILE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EMFILE]
                for _ in range(2):
                    with Wire(where.port) as client:
                        self.assertEqual("ATRN" in client.say("EHLO x"), where.port != local.port)   # as before the rest
                self.assertEqual((failures, self.rests(local) - was), ([], 3))
            self.assertGreaterEqual(local.server.reserve, 0)

    def test_nobody_is_let_in_with_the_last_descriptor(self) -> None:
        real = os.open
        refused: List[bool] = []

        def open_(path: Any, *args: Any, **kwargs: Any) -> int:
            if path == os.devnull and len(refused) < 3:
                refused.append(local.server.crowd > 0)
                raise OSError(errno.EMFILE, "none left")
            return real(path, *args, **kwargs)
        with self.short_of_descriptors() as (local, failures), mock.patch("os.open", open_):
            failures += [errno.EMFILE, errno.EMFILE]    # the reserve is lent, and gone
            with Wire(local.port) as client:
                self.assertEqual(client.greeting[:3], "220")
            self.assertEqual((failures, refused, self.rests(local)), ([], [False] * 3, 4))
            self.assertGreaterEqual(local.server.reserve, 0)

    def test_a_listener_that_rests_can_be_closed(self) -> None:
        with self.short_of_descriptors() as (local, failures):
            failures += [errno.EMFILE] * 1000
            with socket.create_connection(("127.0.0.1", local.port), DEADLINE_S):
                wait(lambda: self.rests(local), "the listener to rest")
                local.server.stop()
                local.thread.join(DEADLINE_S)
        self.assertEqual([line for line in local.log if "bug: " in line], [])
        self.assertTrue(any("stopping" in line for line in local.log))

    def test_who_breaks_off_leaves_nothing_behind(self) -> None:
        relay = self.relay()
        opening = b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<u@ourdom.example>\r\n"
        for sent, how in cases(self, itertools.product(
                [b"", b"EH", b"HELO x\r\n", b"z" * 5000, opening + b"DATA\r\n", opening + b"DATA\r\nhalf a line",
                 opening + b"DATA\r\n" + b"x" * 200000 + b"\r\n.", opening + b"BDAT 5\r\nabcdeBDAT 10 LAST\r\nabc"],
                ("FIN", "RST"))):
            sock, = self.opened(relay, 1)
            sock.sendall(sent)
            if how == "RST":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        wait(lambda: relay.json("--status")["connections"] == 0, "all to be gone")
        wait(lambda: os.listdir(os.path.join(relay.spool, "incoming")) == [], "nothing to be half kept")
        self.assertEqual((relay.files(), [line for line in relay.log if "bug: " in line]), ([], []))

    def test_a_client_that_sends_all_and_closes_its_half_gets_its_replies(self) -> None:
        relay = self.relay()
        sock, = self.opened(relay, 1)
        sock.sendall(b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<u@ourdom.example>\r\nDATA\r\nx\r\n.\r\nQUIT\r\n")
        sock.shutdown(socket.SHUT_WR)
        self.assertRegex(b"".join(iter(lambda: self.read(sock), b"")),
                         rb"354 [^\r]*\r\n250 2\.0\.0 Ok: queued[^\r]*\r\n221 [^\r]*\r\n\Z")

    def test_timeouts_shrink_when_connections_run_short(self) -> None:
        relay = self.relay(relay="max_connections = 10", STRESS_TIMEOUT_S=0.3, SWEEP_S=0.1)
        calm = self.opened(relay, 7)
        self.assertEqual(select.select(calm, [], [], 1.0)[0], [])
        more = self.opened(relay, 2)
        wait(lambda: len(select.select(calm, [], [], 0)[0]) >= 1, "a 421 to the idle")
        self.assertIn(b"421 4.4.2", b"".join(self.read(sock) for sock in select.select(calm, [], [], 0)[0]))
        self.assertEqual(len(more), 2)

    def test_who_speaks_before_the_banner_is_turned_away(self) -> None:
        relay = self.relay(relay="greet_pause = 2s")
        began = time.monotonic()
        hasty, patient, gone = (socket.create_connection(("127.0.0.1", relay.port), DEADLINE_S) for _ in range(3))
        with hasty, patient:
            gone.close()
            hasty.sendall(b"EHLO x\r\n")
            self.assertRegex(b"".join(iter(lambda: self.read(hasty), b"")), rb"\A521 5\.5\.1 [^\r]*\r\n\Z")
            self.assertLess(time.monotonic() - began, 1.9)
            self.assertEqual(patient.recv(4), b"220 ")
            self.assertGreater(time.monotonic() - began, 1.9)
        relay.logged(r"NOQUEUE: reject: PREGREET from unknown\[127\.0\.0\.1\]: 521 5\.5\.1")

    def test_messages_a_minute_are_limited_but_not_for_the_trusted(self) -> None:
        for trusted, limited in cases(self, [("none", True), ("127.0.0.0/8", False)]):
            relay = self.relay(relay="max_message_rate = 2\ntrusted_clients = " + trusted)
            with relay.client() as client:
                replies = []
                for _ in range(6):              # the minute may end meanwhile, once
                    replies.append(client.say("MAIL FROM:<>")[:9])
                    client.say("RSET")
            self.assertEqual(set(replies), {"250 2.1.0", "450 4.7.1"} if limited else {"250 2.1.0"})

    def test_a_queue_that_is_full_takes_no_more_declared_or_not(self) -> None:
        relay = self.relay(domain="max_queue_size = 3000\n[domain roomy.example]\n")
        with relay.client() as client:
            self.assertEqual(client.send(b"x" * 2000 + b"\r\n")[:3], "250")
            self.assertEqual(client.send(b"x" * 20 + b"\r\n", parameters=" SIZE=2000")[:9], "452 4.2.2")
            client.say("RSET")
            self.assertEqual(client.send(b"x" * 2000 + b"\r\n")[:9], "452 4.2.2")
            self.assertEqual(client.send(b"x" * 2000 + b"\r\n", recipients=["u@roomy.example"])[:3], "250")
            self.assertEqual(client.send(b"x" * 20 + b"\r\n")[:3], "250")
        self.assertEqual(len(relay.files()), 6)
        wait(lambda: os.listdir(os.path.join(relay.spool, "incoming")) == [], "nothing to be half kept")

    def test_an_ipv6_network_is_one_client(self) -> None:
        cfg = config("max_connections_per_client = 2\ntrusted_clients = 2001:db8:9::/48", file=os.path.join(self.folder, "x"))
        spool = opened(cfg.spool)
        self.addCleanup(spool.close)
        server = etrn.Server(cfg, spool, etrn.Log("stderr", "error", "x"))
        for address, code in cases(self, [
                ("2001:db8::1", b"220"), ("2001:db8::ffff:1", b"220"), ("2001:db8:0:0:1::1", b"421"), ("2001:db8:0:1::1", b"220"),
                ("192.0.2.1", b"220"), ("192.0.2.2", b"220"), ("::ffff:192.0.2.1", b"220"), ("192.0.2.1", b"421"),
                ("fe80::1%lo", b"220"), ("2001:db8:9::1", b"220"), ("2001:db8:9::1", b"220"), ("2001:db8:9::1", b"220")]):
            ours, theirs = socket.socketpair()
            self.addCleanup(theirs.close)
            ours.setblocking(False)
            server._welcome(ours, address)
            self.assertEqual(theirs.recv(3), code)
        server._close()

    def test_a_stop_lets_a_message_end_and_takes_no_other(self) -> None:
        with shorten(STOP_S=4.0), Local(self.folder) as local:
            with Wire(local.port) as idle, Wire(local.port) as busy:
                busy.say("EHLO x", "MAIL FROM:<>", "RCPT TO:<u@%s>" % DOMAIN)
                self.assertEqual(busy.say("DATA")[:3], "354")
                local.server.stop()
                self.assertEqual((idle.reply()[:9], idle.reply()), ("421 4.3.2", ""))
                busy.raw(b"x\r\n.\r\n")
                self.assertEqual(busy.reply()[:3], "250")
                self.assertEqual((busy.say("MAIL FROM:<>")[:9], busy.reply()), ("421 4.3.2", ""))
            self.assertEqual(len(spool_files(local.spool.path)), 2)

    def test_nothing_from_the_network_forges_a_log_line_a_header_or_a_file_name(self) -> None:
        relay = self.relay()
        nasty = ["<script>alert(1)</script>", '{"a": "b\\u0000"}', "x\u2028y\u2029z", "\u202eevil", "x status=sent (250 ok)",
                 "x]: 5F0A21: removed", "\x85\x9b31m", "%s%n%x", "../../etc/passwd", "a\\r\\nb", "\U0001f600", "x" * 1900]
        for text in cases(self, nasty):
            with relay.client("EHLO " + text) as client:
                quoted = '"%s"' % text.replace('"', "")
                for command in ("MAIL FROM:<%s@b.example> SMTPUTF8" % text, "MAIL FROM:<%s@b.example> SMTPUTF8" % quoted,
                                "MAIL FROM:<> SMTPUTF8", "RCPT TO:<%s@other.example>" % quoted,
                                "RCPT TO:<%s@%s>" % (text, DOMAIN), "RCPT TO:<u@%s>" % DOMAIN):
                    client.say(command)
                client.say("DATA")
                client.raw(b"Subject: x\r\n\r\nx\r\n.\r\n")
                client.reply()
                client.say("RSET", "ETRN " + text, "VRFY " + text)
        rows = relay.queue()
        self.assertGreaterEqual(len(rows), len(nasty) - 1)      # one name is over the length of a command
        for row in rows:
            header = relay.run("--show", row["id"], "--raw")[1].partition("\r\n\r\n")[0]
            self.assertRegex(header, r"\AReceived: from [^\r\n<>(){}\"\\]* \(unknown \[127\.0\.0\.1\]\)\r\n\t[^\r]+\r\n\t[^\r]+"
                             r"(\r\n\t[^\r]+)?\r\nSubject: x\Z")
        assert relay.process is not None
        start = r"\A[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d backup etrn_relay/[a-z]+\[%d\]: " % relay.process.pid
        for line in relay.log:
            self.assertRegex(line, start)
            self.assertTrue(line.isprintable())
        self.assertEqual([line for line in relay.log if "bug: " in line], [])
        for name in itertools.chain.from_iterable(names for _, _, names in os.walk(relay.spool)):
            self.assertRegex(name, r"\A(?:[0-9A-F]{6,20}\.(?:eml|json|new)|(?:state|recipients)\.(?:json|new)|control|lock)\Z")


@unittest.skipUnless(hasattr(os, "geteuid") and os.geteuid() == 0, "only root can become another account")
class Accounts(Relays):
    """The `user` option."""

    def test_root_is_given_up_once_ports_are_bound(self) -> None:
        os.chmod(self.folder, 0o755)
        relay = self.relay(relay="user = nobody")
        assert relay.process is not None
        with open("/proc/%d/status" % relay.process.pid, encoding="ascii") as file:
            ids = re.findall(r"(?m)^[UG]id:\s+(\d+)\s+(\d+)\s+(\d+)\s+(\d+)$", file.read())
        account = pwd.getpwnam("nobody")
        self.assertEqual(ids, [(str(account.pw_uid),) * 4, (str(account.pw_gid),) * 4])
        self.assertEqual(relay.send()[:3], "250")
        self.assertEqual({os.stat(os.path.join(relay.spool, name)).st_uid for name in relay.files()}, {account.pw_uid})
        self.assertEqual(relay.end(), 0)

    def test_an_account_that_cannot_work_is_refused_before_a_port_is_bound(self) -> None:
        folder = os.path.join(self.folder, "closed")
        os.makedirs(os.path.join(folder, "spool"))
        os.chmod(self.folder, 0o755)
        for user, why in cases(self, [("nobody", "cannot write the spool"), ("no-such-account", "no such account")]):
            with socket.socket() as taken:      # a port that is in use would be told first, were it looked at
                taken.bind(("127.0.0.1", 0))
                relay = Relay(folder, "127.0.0.1:9", relay="user = " + user)
                with open(relay.file, encoding="utf-8") as file:
                    text = file.read().replace("127.0.0.1:0", "127.0.0.1:%d" % taken.getsockname()[1])
                with open(relay.file, "w", encoding="utf-8") as file:
                    file.write(text)
                done = subprocess.run([sys.executable, SOURCE, "--config", relay.file], stderr=subprocess.PIPE, check=False,
                                      timeout=DEADLINE_S)
            self.assertEqual(done.returncode, etrn.EX_CONFIG)
            self.assertIn(why, done.stderr.decode())


# -- recipients, cut-through, while_up

def only(*good: str) -> Callable[[str], Optional[str]]:
    """A primary's RCPT: these local parts exist."""
    return lambda argument: None if re.match(r"TO:<(?:%s)@" % "|".join(good), argument) else "550 5.1.1 no such user here"


class Recipients(Relays):
    def answers(self, relay: Relay, *users: str) -> List[str]:
        with relay.client() as client:
            client.say("MAIL FROM:<a@sender.example>")
            return [client.say("RCPT TO:<%s@%s>" % (user, DOMAIN))[:9] for user in users]

    def test_a_list_is_obeyed_and_postmaster_is_on_it(self) -> None:
        relay = self.relay(domain="recipients = one@ourdom.example, Two@OURDOM.example")
        self.assertEqual(self.answers(relay, "one", "ONE", "two", "three", "PostMaster"),
                         ["250 2.1.5"] * 3 + ["550 5.1.1", "250 2.1.5"])

    def test_a_file_is_obeyed_and_read_again_when_it_changes(self) -> None:
        path = os.path.join(self.folder, "recipients")

        def write(text: str) -> None:
            with open(path + ".new", "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(path + ".new", path)
        write("# ours\none@ourdom.example   # the first\nnobody\n\n")
        relay = self.relay(domain="recipients = file:" + path, FILE_CHECK_S=0.05, SWEEP_S=0.05)
        relay.logged(r"recipients: not an address in line 3")
        self.assertEqual(self.answers(relay, "one", "two"), ["250 2.1.5", "550 5.1.1"])
        write("two@ourdom.example\n")
        wait(lambda: self.answers(relay, "one", "two") == ["550 5.1.1", "250 2.1.5"], "the new list")
        os.unlink(path)
        with relay.client():
            relay.logged("recipients: not read again: ")
            self.assertEqual(self.answers(relay, "one", "two"), ["550 5.1.1", "250 2.1.5"])

    def test_the_primary_is_asked_and_its_word_remembered(self) -> None:
        primary = self.primary(RCPT=only("good", "late")).start()
        for policy, code in cases(self, [("accept", "250 2.1.5"), ("defer", "450 4.1.1")]):
            relay = self.relay(primary, domain="recipients = verify\nunknown_recipients = " + policy)
            self.assertEqual(self.answers(relay, "good", "bad", "good"), ["250 2.1.5", "550 5.1.1", "250 2.1.5"])
            with relay.client() as client:
                self.assertIn("(550 5.1.1 no such user here)", client.say("MAIL FROM:<>", "RCPT TO:<worse@%s>" % DOMAIN))
            primary.stop()
            self.answers(relay, "other")
            relay.logged(r"ourdom\.example: down: ")
            self.assertEqual(self.answers(relay, "good", "bad", "late", "Postmaster"),
                             ["250 2.1.5", "550 5.1.1", code, "250 2.1.5"])
            relay.end()
            relay.start()               # what was learned is on disk
            self.assertEqual(self.answers(relay, "good", "bad", "late"), ["250 2.1.5", "550 5.1.1", code])
            primary.start()
            wait(lambda relay=relay: self.answers(relay, "late", "new") == ["250 2.1.5", "550 5.1.1"], "the primary's own word")

    def test_knowledge_has_its_time(self) -> None:
        memory = etrn.Memory()
        memory.learn("Good@x.example", True, 1000.0)
        memory.learn("bad@x.example", False, 1000.0)
        memory.learn_accept_all("y.example", True, 1000.0)
        day = 86400.0
        for after, good, bad, any_other in cases(self, [
                (0.9, True, False, True), (1.1, True, False, None), (2.9, True, False, None), (3.1, True, None, None),
                (30.9, True, None, None), (31.1, None, None, None)]):
            now = 1000.0 + after * day
            self.assertEqual([memory.knows(one, now) for one in ("good@x.example", "bad@x.example", "any@y.example")],
                             [good, bad, any_other])
        again = etrn.Memory()
        again.from_values(json.loads(json.dumps(memory.to_values(1000.0))))
        self.assertEqual((again.known, again.accept_all), (memory.known, memory.accept_all))
        again.from_values({"recipients": {"x": [1, "y"], "z": 5}, "accept_all": [1]})
        self.assertEqual(again.known, memory.known)

    def test_only_a_real_verdict_counts(self) -> None:
        nothing = [{"RCPT": "450 4.2.0 later"}, {"RCPT": "554 5.7.1 not from you"}, {"RCPT": "421 4.7.0 bye"},
                   {"RCPT": "552 5.2.2 full"}, {"RCPT": b"gibberish\r\n"}, {"RCPT": CUT}, {"MAIL": "550 5.1.1 no"},
                   {"greeting": "550 5.1.1 no"}, {"EHLO": "550 5.1.1 no", "HELO": "550 5.1.1 no"},
                   {"RCPT": b"550-5.1.1 a\r\n250 b\r\n"}, {"RCPT": b"350 5.1.1 what\r\n"}]
        verdicts = [{"RCPT": text} for text in ("550 no such user", "551 5.1.6 moved", "553 mailbox name not allowed",
                                                "554 5.1.1 nobody", "550 5.1.10 null mx")]
        relay = self.relay(domain="".join(
            "[domain d%d.example]\nprimary = %s\nrecipients = verify\nunknown_recipients = defer\n"
            % (number, self.primary(**script_).start().address) for number, script_ in enumerate(nothing + verdicts)))
        with relay.client() as client:
            client.say("MAIL FROM:<>")
            for number, script_ in cases(self, enumerate(nothing + verdicts)):
                self.assertEqual(client.say("RCPT TO:<user@d%d.example>" % number)[:9],
                                 "450 4.1.1" if script_ in nothing else "550 5.1.1")
        relay.end()
        with open(os.path.join(relay.spool, "recipients.json"), "rb") as file:
            known = json.load(file)["recipients"]
        self.assertEqual(sorted(known), sorted("user@d%d.example" % number for number in range(11, 16)))

    def test_a_primary_that_takes_everybody_is_not_asked_again(self) -> None:
        primary = self.primary().start()
        relay = self.relay(primary, domain="recipients = verify\nunknown_recipients = defer", INQUIRER_IDLE_S=0.1)
        self.assertEqual(self.answers(relay, "one"), ["250 2.1.5"])
        asked = primary.uses["RCPT"]
        self.assertEqual(asked, 2)      # and a local part that cannot exist
        self.assertEqual(self.answers(relay, "two", "three"), ["250 2.1.5"] * 2)
        self.assertEqual(primary.uses["RCPT"], asked)

    def test_sessions_share_a_question_and_wait_a_few_seconds_at_most(self) -> None:
        primary = self.primary(RCPT=HANG).start()
        relay = self.relay(primary, domain="recipients = verify\n[domain other.example]\nrecipients = any", CALL_AHEAD_S=0.6)
        with contextlib.ExitStack() as stack:
            began = time.monotonic()
            clients = [stack.enter_context(relay.client()) for _ in range(5)]
            for client in clients:
                client.say("MAIL FROM:<>")
                client.raw(b"RCPT TO:<user@ourdom.example>\r\nNOOP\r\n")
            self.assertEqual(relay.send(recipients=["u@other.example"])[:3], "250")     # nobody else waits
            for client in clients:
                self.assertEqual((client.reply()[:9], client.reply()[:3]), ("250 2.1.5", "250"))
            self.assertLess(time.monotonic() - began, 5.0)
        self.assertEqual(sum("user@ourdom.example" in line for line in primary.log), 1 if primary.uses["RCPT"] > 1 else 0)

    def test_a_question_is_given_up_in_its_own_time(self) -> None:
        cfg = config(file=os.path.join(self.folder, "x"))
        spool = opened(cfg.spool)
        self.addCleanup(spool.close)
        server = etrn.Server(cfg, spool, etrn.Log("stderr", "error", "x"))
        manager, heard = server.manager, []
        site = manager.scheduler.site(DOMAIN, server.now)

        def at(seconds: float) -> None:
            manager.tick(etrn.Now(server.now.mono + seconds, server.now.wall + seconds))
        with mock.patch.object(etrn.Inquirer, "start"):
            manager.ask(site, "", lambda *word: heard.append(("first", word)))
            manager._tell_all(DOMAIN, "", "silent", "")
            at(etrn.CALL_AHEAD_S - 1)
            manager.ask(site, "", lambda *word: heard.append(("second", word)))
            at(etrn.CALL_AHEAD_S + 1)
            self.assertEqual(heard, [("first", ("silent", ""))])
            at(2 * etrn.CALL_AHEAD_S)
            self.assertEqual(heard[1:], [("second", ("down", ""))])
        server._close()


class Announced(Relays):
    def test_the_size_announced_is_the_smallest_known(self) -> None:
        small, large = self.primary(), self.primary()
        small.extensions, large.extensions = ["SIZE 4000"], ["SIZE 9000000"]
        relay = self.relay(small.start(), domain="[domain two.example]\nprimary = %s\n" % large.start().address)
        for recipient, size in cases(self, [("u@two.example", 9000000), ("u@" + DOMAIN, 4000), ("u@two.example", 4000)]):
            self.assertEqual(relay.send(recipients=[recipient])[:3], "250")
            wait(relay.is_empty, "an empty spool")
            with Wire(relay.port) as client:
                self.assertIn("250-SIZE %d" % size, client.say("EHLO x").split("\n"))
                self.assertEqual(client.say("MAIL FROM:<> SIZE=%d" % (size + 1))[:9], "552 5.3.4")
        relay.end()
        relay.start()                   # it is remembered

        def announced() -> int:
            with Wire(relay.port) as client:
                return int(re.search(r"250-SIZE (\d+)", client.say("EHLO x")).group(1))    # type: ignore[union-attr]
        self.assertEqual(announced(), 4000)
        relay.end()
        relay.write_config(primary="127.0.0.1:9")       # ... of this primary alone
        relay.start()
        self.assertEqual(announced(), 9000000)
        relay.end()
        relay.write_config(primary=small.address)
        relay.start()
        relay.send()
        wait(relay.is_empty, "an empty spool")
        self.assertEqual(announced(), 4000)
        relay.write_config(primary="127.0.0.1:9")
        relay.signal(signal.SIGHUP)
        relay.logged("configuration reread")
        self.assertEqual(announced(), 9000000)

    def test_the_size_is_learnt_from_a_question_too(self) -> None:
        primary = self.primary()
        primary.extensions = ["SIZE 4000"]
        relay = self.relay(primary.start(), relay="max_message_size = 5000", domain="recipients = verify\n")
        with relay.client() as client:
            self.assertEqual(client.say("MAIL FROM:<a@x.example>", "RCPT TO:<u@%s>" % DOMAIN)[:3], "250")
        with Wire(relay.port) as client:
            self.assertIn("250-SIZE 4000", client.say("EHLO x").split("\n"))


class CutThrough(Relays):
    OPTIONS = "cutthrough = yes\nrecovery_grace = 0s\n"

    def test_the_client_hears_the_primarys_own_verdict(self) -> None:
        table = [({}, "250 2.0.0"), ({".": "554 5.6.0 spam"}, "554 5.6.0 spam"),
                 ({"RCPT": "550 5.1.1 nobody"}, "550 5.1.1 nobody"),
                 ({"MAIL": "550 5.7.1 not you"}, "550 5.7.1 not you"), ({"DATA": "554 5.5.0 no"}, "554 5.5.0 no"),
                 ({".": "550 no status"}, "550 5.0.0 no status"), ({".": "550-5.7.1 two\n550 5.7.1 lines"}, "550 5.7.1 two"),
                 ({".": "451 4.3.0 later"}, "250 2.0.0"), ({"RCPT": "452 4.2.2 full"}, "250 2.0.0"),
                 ({".": b"gibberish\r\n"}, "250 2.0.0"), ({".": CUT}, "250 2.0.0"),
                 ({"greeting": "554 5.3.2 closed"}, "250 2.0.0")]
        primaries = [self.primary(**script_).start() for script_, _ in table]
        relay = self.relay(domain="".join("[domain d%d.example]\nprimary = %s\nretry_interval = 1h\n%s" % (
            number, primary.address, self.OPTIONS) for number, primary in enumerate(primaries)), PROBE_FIRST_S=60.0)
        kept = 0
        for number, (script_, reply) in cases(self, enumerate(table)):
            self.assertEqual(relay.send(recipients=["u@d%d.example" % number])[:len(reply)], reply)
            self.assertEqual(len(primaries[number].messages), 0 if script_ else 1)
            if reply[0] == "5":         # nothing is kept, and that before the client hears of it
                self.assertEqual(relay.files(), [])
                continue
            kept += 2 if script_ else 0
            wait(lambda kept=kept: len(relay.files()) == kept, "%d files" % kept)
        self.assertEqual([line for line in relay.log if "notification" in line], [])
        domains = relay.json("--status")["domains"]
        self.assertEqual([domains["d%d.example" % number]["accepted"] for number in range(len(table))],
                         [int(reply[0] == "2") for _, reply in table])

    def test_a_verdict_reaches_a_client_in_ascii(self) -> None:
        primary = self.primary(**{".": "554 5.6.0 caf\xe9\x01"}).start()
        relay = self.relay(primary, domain=self.OPTIONS)
        self.assertEqual(relay.send(), r"554 5.6.0 caf\xe9\x01")

    def test_mixed_verdicts_are_250_and_the_refused_are_told_by_a_notice(self) -> None:
        primary, smarthost = self.primary(RCPT=only("good")).start(), self.primary().start()
        relay = self.relay(primary, domain=self.OPTIONS, smarthost=smarthost.address)
        self.assertEqual(relay.send(recipients=["good@" + DOMAIN, "bad@" + DOMAIN])[:3], "250")
        wait(lambda: smarthost.messages, "the notice")
        sender, recipients, data = smarthost.messages[0]
        self.assertEqual((sender, recipients, len(primary.messages)), ("", ["a@sender.example"], 1))
        self.assertIn(b"Final-Recipient: rfc822; bad@ourdom.example", data)
        self.assertNotIn(b"Final-Recipient: rfc822; good@", data)
        wait(relay.is_empty, "an empty spool")

    def test_two_domains_must_both_refuse(self) -> None:
        for second, code in cases(self, [({".": "550 5.7.1 no"}, "550 5.7.1"), ({}, "250 2.0.0"),
                                         ({".": "450 4.7.1 no"}, "250 2.0.0")]):
            one, two = self.primary(**{".": "550 5.7.1 no"}).start(), self.primary(**second).start()
            relay = self.relay(one, domain=self.OPTIONS + "[domain two.example]\nprimary = %s\n" % two.address + self.OPTIONS)
            self.assertEqual(relay.send(recipients=["u@" + DOMAIN, "u@two.example"])[:9], code)
            if code[0] == "5":
                self.assertEqual(relay.files(), [])
            relay.end()

    def test_pipelined_messages_are_each_answered_in_turn(self) -> None:
        primary = self.primary(**{".": ["250 2.0.0 a", "554 5.6.0 b", "250 2.0.0 c", "451 4.3.0 d"]}).start()
        relay = self.relay(primary, domain=self.OPTIONS)
        with relay.client() as client:
            envelope = b"MAIL FROM:<a@b.example>\r\nRCPT TO:<u@ourdom.example>\r\n"
            client.raw((envelope + b"BDAT 3 LAST\r\nx\r\n") * 4 + b"NOOP\r\n")
            self.assertEqual([client.reply()[:3] for _ in range(13)],
                             ["250"] * 3 + ["250", "250", "554"] + ["250"] * 3 + ["250"] * 3 + ["250"])
        wait(lambda: len(relay.files()) == 2, "the deferred one alone")

    def test_the_refusal_that_makes_a_primary_rejecting_is_nobodys(self) -> None:
        primary = self.primary().start()
        relay = self.relay(primary, domain=self.OPTIONS)
        people = ["u%d@%s" % (number, DOMAIN) for number in range(3)]
        for script_, replies, left in cases(self, [({}, ["250"] * 3, 0), ({"RCPT": "550 5.1.1 gone"}, ["550", "550", "250"], 2)]):
            primary.script = script_
            self.assertEqual([relay.send(recipients=[one])[:3] for one in people], replies)
            wait(lambda left=left: len(relay.files()) == left, "what was refused to go")
        relay.logged(": rejecting: 550")

    def test_a_primary_that_hangs_or_dies_half_way_costs_the_time_and_no_mail(self) -> None:
        for script_ in cases(self, [{".": HANG}, {"RCPT": HANG}, {"DATA": CUT}, {"greeting": HANG}]):
            primary = self.primary(**script_).start()
            relay = self.relay(primary, domain=self.OPTIONS, CUT_THROUGH_S=0.5)
            began = time.monotonic()
            self.assertEqual(relay.send()[:3], "250")
            self.assertLess(time.monotonic() - began, 4.0)
            self.assertEqual(len(relay.files()), 2)
            primary.stop()
            primary.script.clear()
            primary.start()
            wait(relay.is_empty, "the mail to be delivered")
            self.assertEqual(len(primary.messages), 1)
            relay.end()
            primary.stop()

    def test_a_client_that_leaves_meanwhile_changes_nothing(self) -> None:
        primary = self.primary(**{".": HANG}).start()
        relay = self.relay(primary, domain=self.OPTIONS, CUT_THROUGH_S=0.5)
        client = relay.client()
        client.say("MAIL FROM:<>", "RCPT TO:<u@%s>" % DOMAIN, "DATA")
        client.raw(b"x\r\n.\r\n")
        wait(lambda: primary.uses["."], "the message to be on its way")
        client.close()
        primary.stop()
        primary.script.clear()
        primary.start()
        wait(lambda: primary.messages, "the mail")


class WhileUp(Relays):
    def rcpt(self, relay: Relay, sender: str = "a@b.example", user: str = "u") -> str:
        with relay.client() as client:
            return client.say("MAIL FROM:<%s>" % sender, "RCPT TO:<%s@%s>" % (user, DOMAIN))[:9]

    def test_mail_stays_out_while_the_primary_is_up_but_for_who_persists(self) -> None:
        primary = self.primary().start()
        relay = self.relay(primary, domain="while_up = defer", PERSISTENCE_S=0.5)
        self.assertEqual([self.rcpt(relay) for _ in range(2)], ["450 4.3.2"] * 2)
        self.assertEqual(self.rcpt(relay, user="v"), "450 4.3.2")
        time.sleep(0.6)                 # the five minutes
        self.assertEqual([self.rcpt(relay), self.rcpt(relay)], ["250 2.1.5"] * 2)
        self.assertEqual([self.rcpt(relay, user="v"), self.rcpt(relay, sender="c@b.example")], ["450 4.3.2"] * 2)
        self.assertEqual(self.rcpt(relay, user="v"), "250 2.1.5")

    def test_postmaster_is_always_let_in(self) -> None:
        relay = self.relay(self.primary().start(), domain="while_up = defer")
        self.assertEqual([self.rcpt(relay, user=user) for user in ("u", "postmaster", "PostMaster")],
                         ["450 4.3.2", "250 2.1.5", "250 2.1.5"])

    def test_mail_is_taken_as_soon_as_the_primary_is_not_known_to_be_up(self) -> None:
        primary = self.primary()
        relay = self.relay(primary, domain="while_up = defer", KNOWN_UP_S=0.3, INQUIRER_IDLE_S=0.1)
        self.assertEqual(self.rcpt(relay), "250 2.1.5")
        primary.start()
        wait(lambda: self.rcpt(relay) == "450 4.3.2", "the relay to see that the primary is up")
        primary.stop()
        wait(lambda: self.rcpt(relay, sender="new@b.example") == "250 2.1.5", "mail to be taken")

    def test_persistence_is_three_tries_and_five_minutes_of_the_same_three(self) -> None:
        def tries(*times: float, **other: str) -> List[bool]:
            persistence = etrn.Persistence()
            who = dict({"address": "192.0.2.1", "sender": "a@b.example", "recipient": "u@x.example"}, **other)
            return [persistence.is_taken(now=time, **who) for time in times]
        for times, taken in cases(self, [
                ([0, 299, 299.9], [False] * 3), ([0, 1, 300], [False, False, True]), ([0, 400], [False, False]),
                ([0, 400, 401, 500], [False, False, True, True]), ([0, 1, 90000, 90001, 90301], [False] * 4 + [True])]):
            self.assertEqual(tries(*times), taken)
        persistence = etrn.Persistence()
        for address, now, taken in cases(self, [
                ("192.0.2.1", 0.0, False), ("192.0.2.99", 1.0, False), ("192.0.3.1", 500.0, False), ("192.0.2.7", 500.0, True),
                ("2001:db8::1", 0.0, False), ("2001:db8::2", 1.0, False), ("2001:db8:0:1::1", 500.0, False),
                ("2001:db8::3", 500.0, True)]):
            self.assertEqual(persistence.is_taken(address, "A@b.example", "U@x.example", now), taken)


# -- fuzz: a second each, seeded; ETRN_RELAY_LONG=600 makes it ten minutes

def seeds(test: unittest.TestCase, seconds: float = 1.0) -> Iterator[random.Random]:
    """Sources of chance until the time is over; a failure names the seed."""
    end = time.monotonic() + seconds * LONG
    for seed in itertools.count(int(LONG * 1000)):
        if time.monotonic() > end:
            break
        test.row = seed                 # type: ignore[attr-defined]
        yield random.Random(seed)
    del test.row                        # type: ignore[attr-defined]


def mutated(chance: random.Random, data: bytes, words: Sequence[bytes]) -> bytes:
    """Some octets changed, left out, doubled, or replaced by what may hurt."""
    out = bytearray(data)
    for _ in range(chance.randrange(1, 6)):
        at = chance.randrange(len(out) + 1)
        end = min(len(out), at + chance.choice([0, 1, 1, 2, 5, 40]))
        out[at:end] = chance.choice([b"", bytes([chance.randrange(256)]), bytes(out[at:end]) * 2, chance.choice(words),
                                     bytes(chance.randrange(256) for _ in range(chance.randrange(8)))])
    return bytes(out)


COMMAND_WORDS = [b"\r\n", b"\n", b"\r", b"\0", b"\r\n.\r\n", b"<>", b" ", b"DATA\r\n", b"RSET\r\n", b"QUIT\r\n", b"BDAT 3\r\nabc",
                 b"BDAT 0 LAST\r\n", b"BDAT 99999999999\r\n", b"EHLO x\r\n", b"MAIL FROM:<a@b.example>\r\n", b"SIZE=1",
                 b" BODY=8BITMIME",
                 b"RCPT TO:<u@ourdom.example>\r\n", b"RCPT TO:<u@other.example>\r\n", b"ETRN ourdom.example\r\n",
                 b"\xc3\xa9", b"\xff",
                 b" SMTPUTF8", b"NOTIFY=NEVER", b"x" * 2100, b"@", b'"', b"\\", b"Received: by backup.example.net\r\n" * 3,
                 b"STARTTLS\r\n", b"GET / HTTP/1.1\r\n", b"VRFY @@\r\n", b"HELP\r\n", b"xn--", b"[127.0.0.1]", b"..", b"%", b"!"]
DIALOGUE = (b"EHLO x\r\nMAIL FROM:<a@b.example> SIZE=100 BODY=8BITMIME RET=HDRS ENVID=x\r\n"
            b"RCPT TO:<u@ourdom.example> NOTIFY=DELAY\r\nRCPT TO:<postmaster>\r\n"
            b"DATA\r\nSubject: x\r\n\r\n..text\r\n.\r\nNOOP\r\nMAIL FROM:<>\r\nRCPT TO:<u@a.wild.example>\r\n"
            b"BDAT 8\r\na: b\r\n\r\nBDAT 3 LAST\r\nxy\nVRFY u\r\nETRN @ourdom.example\r\n"
            b"MAIL FROM:<\"a b\"@[192.0.2.1]>\r\nRSET\r\nQUIT\r\n")


class Whims(Player):
    """A server that answers by the question alone, so that every cut of a dialogue gets the same answers."""

    def add(self, what: str, value: Any) -> None:
        super().add(what, value)
        refusal = [None, None, None, etrn.Reply(450, "4.2.0", "no"), etrn.Reply(550, "5.1.1", "no")][
            hashlib.sha256(repr((what, value)).encode()).digest()[0] % 5]
        self.answers.update(mail=refusal, rcpt=refusal, starttls=("TLSv1.3", "X"),
                            commit=refusal or etrn.Reply(250, "2.0.0", "queued"))


class Fuzz(unittest.TestCase):
    def played(self, data: bytes, cuts: Iterable[int], chance_options: Dict[str, Any], has_tls: bool) -> Player:
        session = new_session(**chance_options)
        session.door.has_tls = has_tls
        player = Whims(session)
        bounds = [0, *sorted(cuts), len(data)]
        for start, end in zip(bounds, bounds[1:]):
            player.receive(data[start:end])
            self.assertLessEqual(len(session.buffer), max(etrn.COMMAND_MAX, end - start))
        return player

    def test_any_dialogue_is_answered_in_order_however_it_is_cut(self) -> None:
        for chance in seeds(self, 2.0):
            options = {"size_limit": chance.choice([0, 0, 150, 3000]), "bare_newline": chance.choice(["normalize", "reject"]),
                       "max_recipients": chance.choice([1, 1000])}
            data = mutated(chance, DIALOGUE, COMMAND_WORDS)
            has_tls = chance.random() < 0.2     # then a cut behind STARTTLS is where TLS begins, and not the same
            whole = self.played(data, (), options, has_tls)
            for cuts in (range(len(data)), chance.sample(range(len(data)), min(len(data), 4))):
                other = self.played(data, cuts, options, has_tls)
                if not has_tls:
                    self.assertEqual(other.actions, whole.actions)
            sent = b"".join(data for what, data in whole.actions if what == "send")
            self.assertRegex(sent, rb"\A(?:[2-5]\d\d[ -][^\r\n\0]*\r\n)+\Z")
            self.assertNotRegex(sent, rb"(?m)^250-[^\n]*\n(?!250)")
            for body in whole.bodies:
                self.assertIsNone(re.search(rb"\r(?!\n)|(?<!\r)\n|\0", body))
            if whole.is_closed:
                self.assertEqual(whole.actions[-1][0], "close")
            for note in [value[0] for what, value in whole.actions if what == "note"]:
                self.assertTrue(note.isprintable())

    def test_random_octets_in_every_state(self) -> None:
        states = [b"", b"EHLO x\r\n", OPENING[:-len(b"RCPT TO:<u@ourdom.example>\r\n")], OPENING, OPENING + b"DATA\r\n",
                  OPENING + b"BDAT 100\r\n", OPENING + b"BDAT 1\r\nx", b"x" * 3000]
        for chance in seeds(self):
            state = chance.choice(states)
            noise = b"".join(chance.choice([bytes([chance.randrange(256)]), chance.choice(COMMAND_WORDS)])
                             for _ in range(chance.randrange(60)))
            cuts = [len(state)] + [len(state) + chance.randrange(len(noise) + 1) for _ in range(3)]
            whole = self.played(state + noise, (), {}, False)
            self.assertEqual(self.played(state + noise, cuts, {}, False).actions, whole.actions)

    def test_paths_that_are_taken_are_paths_when_they_are_sent(self) -> None:
        """What was judged is what is sent: a path parsed, shown and parsed again is the same."""
        letters = ["a", "b", ".", "@", '"', "\\", " ", "<", ">", "[", "]", ":", ",", "%", "!", "é", "xn--", "-", "1",
                   "127.0.0.1", "IPv6:::1"]
        for chance in seeds(self, 0.5):
            for _ in range(200):
                text = "<" + "".join(chance.choice(letters) for _ in range(chance.randrange(1, 10))) + ">"
                with contextlib.suppress(etrn.Refuse):
                    path, rest = etrn.parse_path(text, "5.1.3")
                    again, left = etrn.parse_path("<%s>" % str(path), "5.1.3")
                    self.assertEqual((str(again), again.domain, left), (str(path), path.domain, ""))
                    self.assertTrue(rest[:1] in ("", " "))
                    self.assertIsNone(re.search(r"[\x00-\x1f\x7f]", str(path)))

    def test_any_packet_is_an_answer_or_an_error(self) -> None:
        name = "mail.example.org"
        good = [dns_answer(7, name, kind, [record(name, kind, data)] * 3) for kind, data in (
            (etrn.A, "192.0.2.1"), (etrn.AAAA, "2001:db8::1"), (etrn.MX, (10, "mx.example.org")))]
        words = [b"\xc0\x0c", b"\xc0\x00", b"\xc0\xff", b"\0", b"\xff\xff", b"\x3f" + b"x" * 63, b"\x40", b"\x80",
                 struct.pack("!HH", 5, 1)]
        for chance in seeds(self):
            kind = chance.choice([etrn.A, etrn.AAAA, etrn.MX, etrn.CNAME])
            packet = mutated(chance, chance.choice(good), words)
            if chance.random() < 0.5:   # its head as it should be
                packet = dns_answer(7, name, kind)[:6] + packet[6:12] + dns_answer(7, name, kind)[12:] + packet[12:]
            with contextlib.suppress(etrn.DnsError):
                answer = etrn.parse_answer(packet, 7, name, kind)
                if answer is not None:
                    self.assertLessEqual(len(answer.records), etrn.DNS_RECORDS_MAX)

    def test_hosts_that_are_no_names_are_errors_of_the_dns(self) -> None:
        for host in cases(self, ["", "a b", "x" * 64 + ".example", "\xff.example", "a..b", "x" * 300, "-a.example", "a\r\nb"]):
            with self.assertRaises(etrn.DnsError):
                etrn.Resolver((etrn.Endpoint("127.0.0.1", 9),)).addresses(host)

    def test_any_reply_is_a_code_or_an_error_however_it_is_cut(self) -> None:
        class Peer:
            """A socket that says what it was given, in pieces, and then closes."""

            def __init__(self, data: bytes, cuts: Iterable[int]) -> None:
                bounds = [0, *sorted(cuts), len(data)]
                self.pieces = [data[start:end] for start, end in zip(bounds, bounds[1:]) if start < end]

            def recv(self, size: int) -> bytes:
                piece = self.pieces.pop(0) if self.pieces else b""
                if piece[size:]:
                    self.pieces.insert(0, piece[size:])
                return piece[:size]

            def send(self, data: bytes) -> int:
                return len(data)

        def read(data: bytes, cuts: Iterable[int]) -> List[Any]:
            client = etrn.Client("backup.example.net")
            client.sock, client._host, client.end = Peer(data, cuts), "mx.example", float("inf")     # type: ignore[assignment]
            out: List[Any] = []
            try:
                client.hello()
                out.append(dict(client.esmtp_features))
                while True:
                    code, text = client.getreply()
                    self.assertTrue(200 <= code <= 599)
                    self.assertTrue(etrn.reply_text(code, text).isprintable())
                    self.assertRegex(etrn.reply_status(code, text), r"\A%d\.\d{1,3}\.\d{1,3}\Z" % (code // 100))
                    out.append((code, text))
            except etrn.PeerError as error:
                self.assertTrue(str(error).isprintable())
                out.append(str(error))
            return out
        real = (b"250-mx.example\r\n250-PIPELINING\r\n250-SIZE 1000\r\n250-AUTH=LOGIN PLAIN\r\n250 8BITMIME\r\n250 2.1.0 ok\r\n"
                b"550-5.1.1 no\r\n550 5.1.1 user\r\n354 go\r\n250 2.0.0 taken\r\n421 bye\r\n")
        words = [b"\r\n", b"\n", b"\r", b"250-", b"250 ", b"550 ", b"25", b"999 ", b"-1", b"\0", b"\xff", b"4.7.0 ",
                 b" ", b"500 no\r\n"]
        for chance in seeds(self):
            data = mutated(chance, real, words)
            whole = read(data, ())
            self.assertEqual(read(data, range(len(data))), whole)
            self.assertEqual(read(data, chance.sample(range(len(data)), 3)), whole)


# -- real programs

def program(name: str) -> Any:
    return unittest.skipUnless(shutil.which(name), "no %s program" % name)


class RealClients(Secured):
    def run_program(self, *command: str) -> Tuple[int, str]:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
                              timeout=DEADLINE_S, env=dict(os.environ, HOME=self.folder, FETCHMAILHOME=self.folder))
        return done.returncode, done.stdout.decode("utf-8", "replace")

    def secured_relay(self, **options: Any) -> Relay:
        domain = options.pop("domain", "")
        return self.relay(domain=domain + "\n[tls]\ncertificate = %s\nkey = %s\n" % (self.path("one.pem"), self.path("one.key")),
                          **options)

    @program("swaks")
    def test_swaks_sends_over_starttls_and_in_the_clear(self) -> None:
        relay = self.secured_relay()
        command = ["swaks", "--server", "127.0.0.1", "--port", str(relay.port), "--from", "a@sender.example", "--to"]
        for options, tls in cases(self, [(["--tls"], "TLSv1.3"), ([], None), (["--protocol", "SMTP"], None),
                                         (["--pipeline"], None)]):
            status, text = self.run_program(*command, "u@%s,v@%s" % (DOMAIN, DOMAIN), "--helo", "swaks.example", *options)
            self.assertEqual(status, 0, text)
            row = relay.queue()[-1]
            self.assertEqual((row["client"]["helo"], row["client"]["tls"], len(row["recipients"])), ("swaks.example", tls, 2))
        status, text = self.run_program(*command, "u@other.example", "--quit-after", "RCPT")
        self.assertEqual((status, "554 5.7.1" in text), (24, True), text)

    @program("fetchmail")
    def test_fetchmail_flushes_two_domains(self) -> None:
        primary = self.primary()
        relay = self.relay(primary, domain="probe_interval = 1h\n[domain two.example]\nprimary = %s\nprobe_interval = 1h\n"
                           % primary.address, PROBE_FIRST_S=3600.0)
        for domain in (DOMAIN, "two.example"):
            relay.send(recipients=["u@" + domain])
            relay.logged(r"%s: down: " % re.escape(domain))
        primary.start()
        file = os.path.join(self.folder, "fetchmailrc")
        with open(file, "w", encoding="ascii") as stream:
            stream.write("poll 127.0.0.1 proto ETRN port %d fetchdomains %s,two.example\n" % (relay.port, DOMAIN))
        os.chmod(file, 0o600)
        status, text = self.run_program("fetchmail", "-v", "--nodetach", "--nosyslog", "-f", file, "--pidfile",
                                        os.path.join(self.folder, "fetchmail.pid"))
        wait(lambda: len(primary.messages) == 2, "mail of both domains; fetchmail said %d: %s" % (status, text))
        for domain in (DOMAIN, "two.example"):
            relay.logged(r"etrn: site=%s, client=unknown\[127\.0\.0\.1\], messages=1, reply=253" % re.escape(domain))

    @program("msmtp")
    def test_msmtp_asks_for_its_mail(self) -> None:
        relay = self.secured_relay()
        for tls, domain, said in cases(self, [
                (tls, domain, said) for tls in ("off", "on") for domain, said in (
                    (DOMAIN, "250 2.0.0 OK, queuing for node ourdom.example started"), ("@other.example", "459 4.7.1 "))]):
            status, text = self.run_program("msmtp", "--host=127.0.0.1", "--port=%d" % relay.port, "--tls=" + tls,
                                            "--tls-certcheck=off", "--auth=off", "--rmqs=" + domain, "--debug")
            self.assertEqual((status == 0, said in text), (said[0] == "2", True), text)


POSTFIX = """\
compatibility_level = 3.6
queue_directory = %(folder)s/spool
data_directory = %(folder)s/data
command_directory = /usr/sbin
daemon_directory = /usr/lib/postfix/sbin
mail_owner = postfix
setgid_group = postdrop
myhostname = primary.example
mydestination =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mynetworks = 127.0.0.0/8
relay_domains = ourdom.example
transport_maps = inline:{ourdom.example=discard:, far.example=smtp:[127.0.0.1]:%(relay)d}
relay_recipient_maps =
smtpd_tls_security_level = may
smtpd_tls_cert_file = %(pems)s/one.pem
smtpd_tls_key_file = %(pems)s/one.key
smtpd_tls_loglevel = 1
smtpd_tls_received_header = yes
smtp_tls_security_level = encrypt
smtp_tls_loglevel = 1
maillog_file = %(folder)s/spool/mail.log
maillog_file_prefixes = %(folder)s
alias_maps =
notify_classes =
"""


@unittest.skipUnless(hasattr(os, "geteuid") and os.geteuid() == 0, "only root can start a Postfix of its own")
@unittest.skipUnless(os.path.exists("/usr/share/postfix/master.cf.dist"), "no Debian postfix")
class RealPostfix(Secured):
    def setUp(self) -> None:
        super().setUp()
        os.chmod(self.folder, 0o755)
        self.port = unused_port()

    def start_postfix(self, relay: int) -> None:
        """A Postfix of the test's own: a primary for ourdom.example, and a sender to far.example."""
        folder = self.path("postfix")
        for name in ("etc", "spool", "data"):
            os.makedirs(os.path.join(folder, name))
        os.chmod(folder, 0o755)
        shutil.chown(os.path.join(folder, "data"), "postfix")
        with open(os.path.join(folder, "etc", "main.cf"), "w", encoding="ascii") as file:
            file.write(POSTFIX % {"folder": folder, "relay": relay, "pems": self.folder})
        with open("/usr/share/postfix/master.cf.dist", encoding="utf-8") as file:
            master = re.sub(r"(?m)^smtp(\s+inet\s)", r"%d\1" % self.port, file.read())
        master = re.sub(r"(?m)^(\S+\s+(?:unix|inet|fifo)\s+\S+\s+\S+\s+)y", r"\1n", master)     # no chroot
        with open(os.path.join(folder, "etc", "master.cf"), "w", encoding="utf-8") as file:
            file.write(master)
        self.log = os.path.join(folder, "spool", "mail.log")
        command = ["postfix", "-c", os.path.join(folder, "etc")]
        subprocess.run([*command, "start"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60)
        self.addCleanup(subprocess.run, [*command, "stop"], check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                        timeout=60)
        wait(lambda: self.logged("daemon started"), "Postfix to start")

    def logged(self, pattern: str) -> bool:
        try:
            with open(self.log, encoding="utf-8", errors="replace") as file:
                return re.search(pattern, file.read()) is not None
        except FileNotFoundError:
            return False

    def test_mail_goes_over_starttls_from_a_postfix_and_to_a_postfix(self) -> None:
        pin = hashlib.sha256(ssl.PEM_cert_to_DER_cert(PEMS["one.pem"])).hexdigest()
        relay = self.relay("127.0.0.1:%d" % self.port, domain=(
            "tls = sha256:%s\nrecipients = verify\ncutthrough = yes\n[domain far.example]\nprimary = 127.0.0.1:9\n"
            "[tls]\ncertificate = %s\nkey = %s\n" % (pin, self.path("one.pem"), self.path("one.key"))))
        self.start_postfix(relay.port)
        # To the primary: asked for the recipient, then given the message while the client waits.
        self.assertEqual(relay.send()[:3], "250")
        wait(lambda: self.logged(r"to=<user@ourdom\.example>.*status=sent"), "the message at Postfix")
        self.assertTrue(self.logged(r"Anonymous TLS connection established from .*127\.0\.0\.1.*TLSv1\.[23]"))
        relay.logged(r"to=<user@ourdom\.example>, relay=127\.0\.0\.1\[127\.0\.0\.1\]:%d, .*dsn=2\.0\.0, "
                     r"status=sent \(250 2\.0\.0 Ok" % self.port)
        wait(relay.is_empty, "an empty spool")
        # From Postfix, as a sender.
        with Wire(self.port) as client:
            client.say("EHLO client.example")
            self.assertEqual(client.send(MESSAGE, recipients=["u@far.example", "v@far.example"])[:3], "250")
        wait(lambda: self.logged(r"to=<v@far\.example>.*status=sent \(250 2\.0\.0 Ok: queued as"), "Postfix to be rid of it")
        row = relay.queue()[0]
        self.assertRegex(row["client"]["tls"], r"\ATLSv1\.[23]\Z")
        self.assertEqual([one["address"] for one in row["recipients"]], ["u@far.example", "v@far.example"])
        self.assertRegex(relay.run("--show", row["id"], "--raw")[1],
                         r"\AReceived: from primary\.example \(unknown \[127\.0\.0\.1\]\)\r\n"
                         r"\t\(using TLSv1\.[23] with cipher [A-Z0-9_-]+\)\r\n"
                         r"\tby backup\.example\.net \(etrn_relay\) with ESMTPS id ")
LOGIN_OPTIONS = "username = gw\npassword = se cret"
ODMR = "odmr_listen = 127.0.0.1:0"


def log_in(wire: Wire, username: str = "gw", password: str = "se cret", mechanism: str = "CRAM-MD5") -> str:
    """EHLO and AUTH; returns the reply."""
    wire.say("EHLO gw.example")
    if mechanism == "PLAIN":
        return wire.say("AUTH PLAIN " + base64.b64encode(("\0%s\0%s" % (username, password)).encode()).decode())
    challenge = base64.b64decode(wire.say("AUTH CRAM-MD5")[4:])
    digest = hmac.new(password.encode(), challenge, "md5").hexdigest()
    return wire.say(base64.b64encode(("%s %s" % (username, digest)).encode()).decode())


class Authenticated(Relays):
    """ETRN by a client that authenticated, and primary = etrn."""

    def test_it_may_flush_and_count_its_own_domains_and_no_others(self) -> None:
        port = self.primary().port
        relay = self.relay("127.0.0.2:%d" % port, LOGIN_FAILED_S=0.01, domain=LOGIN_OPTIONS + "\netrn = 192.0.2.0/24\n"
                           "[domain other.example]\nprimary = 127.0.0.2:%d\n[domain shut.example]\netrn = none\n%s\n"
                           "[domain sub.ourdom.example]\nprimary = 127.0.0.2:%d\n%s" % (port, LOGIN_OPTIONS, port, LOGIN_OPTIONS))
        relay.send(recipients=["u@" + DOMAIN, "u@other.example"])
        for name in ("ourdom", "other"):
            relay.logged(name + r"\.example: down: ")
        with Wire(relay.port) as client:
            client.say("EHLO x")
            self.assertEqual(client.say("ETRN " + DOMAIN)[:9], "459 4.7.1")         # not from that address
            self.assertEqual(client.say("ETRN other.example")[:9], "250 2.0.0")
            self.assertEqual(log_in(client), "235 2.7.0 Authentication successful")
            for command, expected in cases(self, [
                    ("ETRN " + DOMAIN, "253 2.0.0 OK, 1 pending messages for node ourdom.example started"),
                    ("ETRN @" + DOMAIN, "25"), ("ETRN other.example", "459 4.7.1"), ("ETRN shut.example", "459 4.7.1"),
                    ("ETRN @example", "459 4.7.1"), ("ETRN elsewhere.example", "459 4.7.1")]):
                reply = client.say(command)
                self.assertTrue(reply.startswith(expected), reply)
            self.assertEqual(client.say("MAIL FROM:<>", "RCPT TO:<u@elsewhere.example>")[:9], "554 5.7.1")
        relay.logged(r"smtpd\[\d+\]: unknown\[127\.0\.0\.1\]: sasl_method=CRAM-MD5, sasl_username=gw$")

    def test_passwords_are_read_from_files_and_again_at_sighup(self) -> None:
        secret = os.path.join(self.folder, "secret")

        def write(text: str) -> None:
            with open(secret, "w", encoding="utf-8") as file:
                file.write(text)
        write("pâss 1\n")
        relay = self.relay(domain="username = gw\npassword = file:" + secret, LOGIN_FAILED_S=0.01)

        def try_password(password: str) -> str:
            with Wire(relay.port) as client:
                return log_in(client, password=password)[:3]
        self.assertEqual([try_password(one) for one in ("pâss 1", "pass 1", "")], ["235", "535", "535"])
        for content, logged in cases(self, [("two", "configuration reread"), ("", "not reloaded.*empty")]):
            write(content)
            relay.signal(signal.SIGHUP)
            relay.logged(logged)
            self.assertEqual(try_password("two"), "235")
        relay.end()
        self.assertEqual(relay.run()[0], 78)            # a name without a password does not start

    def test_failed_logins_are_slow_logged_and_limited(self) -> None:
        relay = self.relay(domain=LOGIN_OPTIONS, LOGIN_FAILED_S=0.3)
        with Wire(relay.port) as client:
            began = time.monotonic()
            self.assertEqual([log_in(client, password="x")[:9], log_in(client, "nobody")[:9], log_in(client, password="y")[:9],
                              client.reply()], ["535 5.7.8", "535 5.7.8", "421 4.7.0", ""])
            self.assertGreater(time.monotonic() - began, 0.9)
        relay.logged(r"etrn_relay/smtpd\[\d+\]: warning: unknown\[127\.0\.0\.1\]: SASL CRAM-MD5 authentication failed: "
                     r"authentication failed, sasl_username=nobody")

    def test_the_lines_are_those_fail2ban_looks_for(self) -> None:
        filter_file = "/etc/fail2ban/filter.d/postfix.conf"
        if shutil.which("fail2ban-regex") is None or not os.path.exists(filter_file):
            self.skipTest("fail2ban is not installed")
        relay = self.relay(domain=LOGIN_OPTIONS, LOGIN_FAILED_S=0.01)
        with Wire(relay.port) as client:
            self.assertEqual(log_in(client, password="x")[:3], "535")
        line = relay.logged(r"^.*authentication failed.*$").group()
        done = subprocess.run(["fail2ban-regex", "--print-all-matched", line,
                               "postfix[mode=auth, _daemon=etrn_relay/smtpd, _port=]"], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, check=False)
        self.assertIn(b"1 matched", done.stdout)

    def test_mail_goes_where_the_last_authenticated_etrn_came_from(self) -> None:
        primary = self.primary().start()
        relay = self.relay("etrn", domain=LOGIN_OPTIONS, SMTP_PORT=primary.port)
        relay.send()
        relay.logged(r"to=<user@ourdom\.example>, relay=none, .*dsn=4\.4\.1, status=deferred \(waits for the domain's")
        one = relay.json("--status")["domains"][DOMAIN]
        self.assertEqual((one["primary"], one["next_probe"], one["last_error"]), ("unknown", None, etrn.WAITS["etrn"]))
        row, = relay.queue()
        self.assertEqual((row["state"], row["next_attempt"], row["recipients"][0]["attempts"]), ("queued", None, 0))
        with Wire(relay.port) as client:
            client.say("EHLO x")
            self.assertEqual(client.say("ETRN " + DOMAIN)[:3], "250")       # a stranger moves nothing
            self.assertEqual((log_in(client)[:3], client.say("ETRN " + DOMAIN)[:3]), ("235", "253"))
        wait(relay.is_empty, "an empty spool")
        self.assertEqual(len(primary.messages), 1)
        relay.logged(r"primary\[\d+\]: ourdom\.example: at 127\.0\.0\.1 since an authenticated ETRN")
        relay.end()
        relay.start()                   # it is known after a restart, too
        relay.send()
        wait(lambda: len(primary.messages) == 2)
        self.assertIn("at 127.0.0.1 since an authenticated ETRN", relay.run("--status")[1])
        self.assertIn("primary: at 127.0.0.1 since", relay.run("--check")[1])

    def test_an_etrn_from_this_host_itself_makes_no_loop(self) -> None:
        relay = self.relay("etrn", domain=LOGIN_OPTIONS)
        relay.send()
        relay.end()
        port = relay.limits["SMTP_PORT"] = unused_port()
        relay.write_config()
        with open(relay.file, encoding="utf-8") as file:
            text = file.read().replace("127.0.0.1:0", "127.0.0.1:%d" % port)
        with open(relay.file, "w", encoding="utf-8") as file:
            file.write(text)
        relay.start()
        relay.read_spool()
        with Wire(relay.port) as client:
            self.assertEqual((log_in(client)[:3], client.say("ETRN " + DOMAIN)[:3]), ("235", "253"))
        relay.logged(r"ourdom\.example: down: mail for ourdom\.example loops back to this host")
        self.assertEqual(len(relay.queue()), 1)

    def test_a_primary_that_moves_is_delivered_to_at_its_new_address(self) -> None:
        name = "moves.example"
        with Local(self.folder, domain="[domain moves.example]\nprimary = etrn\n" + LOGIN_OPTIONS) as local:
            manager = local.server.manager
            site = manager.scheduler.site(name, manager.now)
            for address in cases(self, ["192.0.2.8", "2001:db8::8", "192.0.2.8"]):
                local.server.post([(lambda address: manager.move(name, address), address)])
                wait(lambda address=address: manager.plan(site).primary == ((address, 25),), "the move")
        state = opened(local.cfg.spool)
        self.addCleanup(state.close)
        self.assertEqual(state.load_state()["homes"], {name: "192.0.2.8"})

    def test_a_primary_that_moved_is_not_waited_for_where_it_was(self) -> None:
        class Moved(Primary):
            def _bind(self) -> socket.socket:
                sock = socket.socket()
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(("127.0.0.3", old.port))
                return sock

        old = self.primary(RCPT=HANG).start()
        new = Moved()
        self.addCleanup(new.__exit__)
        new.start()
        relay = self.relay("etrn", domain=LOGIN_OPTIONS, SMTP_PORT=old.port, PART_S=0.1)
        relay.send()
        for source, primary in ((None, old), ("127.0.0.3", new)):
            with Wire(relay.port, source or "127.0.0.1") as client:
                self.assertEqual((log_in(client)[:3], client.say("ETRN " + DOMAIN)[:2]), ("235", "25"))
            wait(lambda primary=primary: primary.uses["RCPT"], "a delivery there")
        wait(relay.is_empty, "an empty spool")
        self.assertEqual((len(old.messages), len(new.messages)), (0, 1))


class Odmr(Relays):
    """ATRN: the customer comes for its mail."""

    def odmr(self, **options: Any) -> Relay:
        """A relay whose domain's mail waits to be collected; `odmr_port` is its port for that."""
        options.setdefault("relay", ODMR)
        relay = self.relay(options.pop("primary", "atrn"), **dict({"domain": LOGIN_OPTIONS, "LOGIN_FAILED_S": 0.01}, **options))
        relay.odmr_port = int(relay.logged(r"ODMR on 127\.0\.0\.1:(\d+)").group(1))      # type: ignore[attr-defined]
        wait(lambda: "still being read" not in relay.run("--status")[1], "a spool that is read")
        return relay

    @staticmethod
    def visit(relay: Relay, **login: Any) -> Wire:
        wire = Wire(relay.odmr_port)    # type: ignore[attr-defined]
        assert log_in(wire, **login)[:3] == "235"
        return wire

    def collect(self, relay: Relay, customer: Primary, command: str = "ATRN") -> str:
        """One visit of a customer, who then serves SMTP on the connection it made; returns the reply to ATRN."""
        with self.visit(relay) as wire:
            reply = wire.say(command)
            if reply[:3] == "250":
                customer._serve(wire.sock)
            return reply

    def test_mail_is_collected_over_the_customers_own_connection(self) -> None:
        relay = self.odmr()
        self.assertEqual(self.collect(relay, self.primary()), "453 4.0.0 You have no mail")
        for number in range(25):
            relay.send(b"Subject: %d\r\n\r\n.dot\r\n" % number)
        relay.logged(r"to=<user@ourdom\.example>, relay=none, .*status=deferred \(waits to be collected by")
        customer = self.primary()
        self.assertEqual(self.collect(relay, customer, "atrn " + DOMAIN.upper()), "250 2.0.0 OK now reversing the connection")
        wait(relay.is_empty, "an empty spool")
        self.assertEqual([without_received(data) for _, _, data in customer.messages],
                         [b"Subject: %d\r\n\r\n.dot\r\n" % number for number in range(25)])
        self.assertEqual((customer.log[0], customer.log[-1]), ("ehlo backup.example.net", "QUIT"))
        relay.logged(r"flush\[\d+\]: atrn: site=ourdom\.example, client=unknown\[127\.0\.0\.1\], messages=25, reply=250")
        relay.logged(r"to=<user@ourdom\.example>, relay=gw\.example\[127\.0\.0\.1\]:\d+, .*dsn=2\.0\.0, status=sent")
        wait(lambda: relay.json("--status")["connections"] == 0, "the customer to be gone")
        wait(lambda: relay.json("--status")["spool"]["messages"] == 0, "an empty queue")
        one = relay.json("--status")["domains"][DOMAIN]
        self.assertEqual((one["primary"], one["delivered"], one["next_probe"]), ("unknown", 25, None))
        self.assertEqual(self.collect(relay, customer)[:3], "453")

    def test_a_disk_that_lags_behind_keeps_nobody_from_collecting_all(self) -> None:
        relay = self.odmr(UNRECORDED_MAX=1, JOBS_PER_CONNECTION=1, JOBS_REFILL=1)
        for number in range(5):
            relay.send(b"Subject: %d\r\n\r\n" % number)
        customer = self.primary()
        self.assertEqual(self.collect(relay, customer)[:3], "250")
        self.assertEqual(len(customer.messages), 5)

    def test_mail_is_collected_within_tls(self) -> None:
        if etrn.ssl is None:
            self.skipTest("this Python has no ssl module")
        tls = "\n[tls]\ncertificate = %s\nkey = %s" % make_certificate(self, self.folder)
        relay = self.odmr(relay=ODMR + tls, domain=LOGIN_OPTIONS + "\ntls = require")
        bodies = [MESSAGE, b"Subject: large\r\n\r\n" + b"y" * 70 + b"\r\n" * 20000]
        for body in bodies:
            relay.send(body)
        with self.visit(relay) as wire:
            self.assertEqual(wire.say("ATRN")[:9], "530 5.7.0")     # tls = require
        customer = self.primary()
        context = etrn.ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, etrn.ssl.CERT_NONE
        with Wire(relay.odmr_port) as wire:     # type: ignore[attr-defined]
            wire.say("EHLO x")
            self.assertEqual(wire.say("STARTTLS")[:3], "220")
            wire.lines.close()
            wire.sock = context.wrap_socket(wire.sock)
            wire.lines = wire.sock.makefile("rb")
            self.assertEqual((log_in(wire, mechanism="PLAIN")[:3], wire.say("ATRN")[:3]), ("235", "250"))
            customer._serve(wire.sock)
        wait(relay.is_empty, "an empty spool")
        self.assertEqual([without_received(data) for _, _, data in customer.messages], bodies)

    def test_what_the_customer_says_at_once_is_not_lost(self) -> None:
        relay = self.odmr()
        relay.send()
        with self.visit(relay) as wire:
            wire.raw(b"ATRN\r\n220 early ESMTP\r\n250 early\r\n")
            self.assertEqual(wire.reply()[:3], "250")
            self.assertEqual([wire.reply()[:4] for _ in range(2)], ["ehlo", "MAIL"])

    def test_each_domain_of_the_customer_has_its_turn(self) -> None:
        relay = self.odmr(domain=LOGIN_OPTIONS + "\n[domain .wild.example]\nprimary = atrn\n%s\n[domain other.example]\n"
                          "primary = atrn\nusername = other\npassword = x\n[domain empty.example]\n%s" % ((LOGIN_OPTIONS,) * 2))
        relay.send(recipients=["u@" + DOMAIN, "u@a.wild.example", "u@b.wild.example", "u@other.example"])
        with self.visit(relay) as wire:
            for domains, expected in cases(self, [("other.example", "450 4.7.1"), (DOMAIN + ",other.example", "450 4.7.1"),
                                                  ("wild.example", "450 4.7.1"), ("elsewhere.example", "450 4.7.1"),
                                                  ("empty.example", "453 4.0.0"), ("c.wild.example", "453 4.0.0")]):
                self.assertEqual(wire.say("ATRN " + domains)[:9], expected)
        customer = self.primary()
        self.assertEqual(self.collect(relay, customer, "ATRN a.wild.example, empty.example")[:3], "250")
        self.assertEqual([people for _, people, _ in customer.messages], [["u@a.wild.example"]])
        wait(lambda: relay.json("--status")["connections"] == 0, "the first visit to be over")
        self.assertEqual(self.collect(relay, customer)[:3], "250")
        wait(lambda: [row["domain"] for row in relay.queue()] == ["other.example"], "the other customer's mail to remain")
        self.assertEqual(sorted(people[0] for _, people, _ in customer.messages),
                         ["u@a.wild.example", "u@b.wild.example", "u@" + DOMAIN])
        self.assertEqual(customer.log.count("QUIT"), 2)         # two visits: both domains of the second went over one connection

    def test_two_customers_do_not_get_the_same_mail(self) -> None:
        relay = self.odmr()
        relay.send()
        with self.visit(relay) as first, self.visit(relay) as second:
            self.assertEqual([wire.say("ATRN")[:9] for wire in (first, second)], ["250 2.0.0", "451 4.3.0"])
            self.assertEqual(relay.json("--status")["connections"], 2)
            first.close()
            wait(lambda: second.say("ATRN")[:3] == "250", "the first to be gone")
            customer = self.primary()
            customer._serve(second.sock)
        wait(relay.is_empty, "an empty spool")
        self.assertEqual(len(customer.messages), 1)

    def test_a_customer_that_vanishes_loses_nothing(self) -> None:
        relay = self.odmr()
        for _ in range(3):
            relay.send()
        for script in cases(self, [{"greeting": CUT}, {"greeting": "554 no"}, {"greeting": b"\xff\r\n"}, {"EHLO": CUT},
                                   {"MAIL": CUT}, {"RCPT": "421 no"}, {"DATA": CUT}, {".": CUT}]):
            customer = self.primary(**script)
            wait(lambda customer=customer: self.collect(relay, customer)[:3] == "250", "the last one to be gone")
            self.assertEqual((len(relay.queue()), customer.messages), (3, []))
        wait(lambda: relay.json("--status")["connections"] == 0, "the last one to be gone")
        self.assertEqual(relay.json("--status")["domains"][DOMAIN]["primary"], "unknown")
        wait(lambda: {row["state"] for row in relay.queue()} == {"queued"}, "all to be written down")
        customer = self.primary()
        self.assertEqual(self.collect(relay, customer)[:3], "250")
        wait(relay.is_empty, "an empty spool")
        self.assertEqual(len(customer.messages), 3)

    def test_verdicts_are_taken_as_those_of_any_primary(self) -> None:
        relay = self.odmr()
        for name in ("later", "never", "fine"):
            relay.send(recipients=["%s@%s" % (name, DOMAIN)])
        customer = self.primary(RCPT=lambda argument: "450 4.2.0 later" if "later" in argument else
                                "550 5.1.1 who?" if "never" in argument else None)
        self.assertEqual(self.collect(relay, customer)[:3], "250")
        wait(lambda: [row["state"] for row in relay.queue()] == ["queued"] * 2, "two messages to remain")
        people = [row["recipients"][0] for row in relay.queue()]
        self.assertEqual([(one["address"].partition("@")[0], one["attempts"], one["last_response"][:3]) for one in people],
                         [("later", 1, "450"), ("never", 1, "550")])
        self.assertEqual([people for _, people, _ in customer.messages], [["fine@" + DOMAIN]])

    def test_a_second_refusal_is_final_and_told(self) -> None:
        relay = self.odmr(domain=LOGIN_OPTIONS + "\nrecovery_grace = 0s\n", smarthost=self.primary().address)
        relay.send(recipients=["never@" + DOMAIN])
        self.assertEqual(self.collect(relay, self.primary(RCPT="550 5.1.1 who?"))[:3], "250")
        relay.logged(r"to=<never@ourdom\.example>, relay=gw\.example.*status=bounced \(550 5\.1\.1 who")

    def test_who_waits_for_a_flush_of_such_mail_is_told_that_it_waits(self) -> None:
        for running in cases(self, [True, False]):
            relay = self.odmr()
            relay.send()
            relay.send()
            if not running:
                relay.end()
            code, text, _ = relay.run("--flush", DOMAIN)
            self.assertEqual((code, text), (75, DOMAIN + ": 0 delivered, 0 returned, 2 still waiting: %s\n" % etrn.WAITS["atrn"]))
            self.assertIn("ourdom.example: " + etrn.WAITS["atrn"], relay.run("--status")[1])
            self.assertIn(etrn.WAITS["atrn"], relay.run("--queue")[1])
        with self.odmr().client() as client:
            self.assertEqual([client.say("ETRN " + DOMAIN)[:3] for _ in range(2)], ["250", "250"])

    def test_mail_nobody_collects_is_returned_at_the_end_of_its_lifetime(self) -> None:
        smarthost = self.primary().start()
        relay = self.odmr(domain=LOGIN_OPTIONS + "\nlifetime = 1s", smarthost=smarthost.address)
        relay.send()
        notice = wait(lambda: smarthost.messages and smarthost.messages[0][2])
        self.assertIn(etrn.UNCOLLECTED.encode(), b" ".join(notice.split()))
        relay.logged(r"to=<user@ourdom\.example>, relay=none, .*status=expired \(the domain's own mail server did not come")

    def test_held_mail_is_not_collected_and_a_visit_in_vain_costs_nothing(self) -> None:
        relay = self.odmr()
        relay.send()
        relay.run("--hold", DOMAIN)
        with self.visit(relay) as wire:
            self.assertEqual(wire.say("ATRN")[:9], "451 4.3.0")
            relay.run("--release", DOMAIN)
            relay.run("--hold", relay.queue()[0]["id"])
            self.assertEqual(wire.say("ATRN")[:9], "453 4.0.0")
            relay.run("--release", "all")
            self.assertEqual(wire.say("ATRN")[:3], "250")

    def test_a_stop_ends_a_collection_in_order(self) -> None:
        relay = self.odmr()
        for _ in range(2):
            relay.send()
        with self.visit(relay) as wire:
            self.assertEqual(wire.say("ATRN")[:3], "250")
            began = time.monotonic()
            self.assertEqual(relay.end(), 0)            # it hangs before its 220
            self.assertLess(time.monotonic() - began, 5)
        relay.start()
        self.assertEqual(len(relay.queue()), 2)

    def test_a_customer_counts_as_a_connection_to_its_end(self) -> None:
        relay = self.odmr(relay=ODMR + "\nmax_connections_per_client = 1")
        with Wire(relay.port) as wire:
            wire.say("EHLO x")
            wire.send(MESSAGE)
            wire.say("QUIT")
        wait(lambda: relay.json("--status")["connections"] == 0)
        with self.visit(relay) as wire:
            self.assertEqual(wire.say("ATRN")[:3], "250")
            with Wire(relay.port) as other:
                self.assertEqual(other.greeting[:3], "421")
        wait(lambda: relay.json("--status")["connections"] == 0)
        with Wire(relay.port) as other:
            self.assertEqual(other.greeting[:3], "220")

    def test_who_is_silent_gives_way_to_the_next(self) -> None:
        relay = self.odmr(ATRN_SILENT_S=0.0)
        relay.send()
        with self.visit(relay) as silent, self.visit(relay) as other:
            self.assertEqual((silent.say("ATRN")[:3], other.say("ATRN")[:9]), ("250", "451 4.3.0"))
            self.assertEqual(silent.lines.readline(), b"")          # hung up on
        customer = self.primary()
        wait(lambda: self.collect(relay, customer)[:3] == "250", "its turn")
        wait(relay.is_empty, "an empty spool")

    def test_a_courier_that_cannot_start_costs_its_client_alone(self) -> None:
        with Local(self.folder, ODMR, "[domain atrn.example]\nprimary = atrn\nrecipients = any\n" + LOGIN_OPTIONS) as local:
            local.server.load_logins()
            with Wire(local.port) as client:
                client.say("EHLO x")
                client.send(MESSAGE, recipients=["u@atrn.example"])
            port = local.server.manager.listeners[1].port
            with Wire(port) as wire, mock.patch.object(etrn.Turnaround, "start", side_effect=RuntimeError("no more threads")):
                log_in(wire)
                self.assertEqual(wire.say("ATRN"), "")
            wait(lambda: local.server.crowd == 0, "no connections")
            customer = self.primary()
            with Wire(port) as wire:
                log_in(wire)
                self.assertEqual(wire.say("ATRN")[:3], "250")
                customer._serve(wire.sock)
            wait(lambda: not spool_files(local.spool.path), "an empty spool")
            self.assertEqual(len(customer.messages), 1)

    def test_check_says_when_nobody_could_come(self) -> None:
        relay = Relay(self.folder, "atrn")
        for options, level, text in cases(self, [
                ({"domain": ""}, "error", "needs a username"), ({"domain": LOGIN_OPTIONS}, "error", "needs odmr_listen"),
                ({"domain": LOGIN_OPTIONS, "relay": ODMR}, "ok", "primary: mail waits to be collected by"),
                ({"domain": LOGIN_OPTIONS, "primary": "etrn"}, "ok", "waits for the domain's own mail server"),
                ({"domain": LOGIN_OPTIONS + "\netrn = none", "primary": "etrn"}, "error", "etrn = none"),
                ({"domain": "username = gw\npassword = file:none"}, "error", "the password of gw cannot be read")]):
            relay.write_config(**options)
            found = [one for one in json.loads(relay.run("--check", "--json")[1]) if text in one["text"]]
            self.assertEqual([one["level"] for one in found], [level])

    def test_a_domain_with_a_primary_of_its_own_may_be_collected_too(self) -> None:
        relay = self.odmr(primary=self.primary().address)
        relay.send()
        relay.logged(": down: ")
        customer = self.primary()
        self.assertEqual(self.collect(relay, customer)[:3], "250")
        relay.logged(r"ourdom\.example: up after ")
        wait(relay.is_empty, "an empty spool")
        self.assertEqual(len(customer.messages), 1)


class Fetchmail(Relays):
    """The one client of ODMR in common use."""

    def setUp(self) -> None:
        super().setUp()
        if shutil.which("fetchmail") is None:
            self.skipTest("fetchmail is not installed")

    def fetch(self, text: str, *prefix: str) -> str:
        """Run it once; returns what it said."""
        file = os.path.join(self.folder, "fetchmailrc")
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as stream:
            stream.write("set no bouncemail\n" + text + "\n")
        done = subprocess.run([*prefix, "fetchmail", "-f", file, "-v", "--nodetach", "--pidfile", file + ".pid", "--timeout",
                               "20"], env=dict(os.environ, HOME=self.folder, FETCHMAILHOME=self.folder), stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=DEADLINE_S, check=False)
        return done.stdout.decode("utf-8", "replace")

    RC = ('poll %s protocol ODMR port %d auth cram-md5 username "gw" password "se cret" '
          "fetchdomains ourdom.example smtphost 127.0.0.1/%d")

    def test_it_collects_a_queue(self) -> None:
        relay = self.relay("atrn", relay=ODMR, domain=LOGIN_OPTIONS)
        port = int(relay.logged(r"ODMR on 127\.0\.0\.1:(\d+)").group(1))
        bodies = [b"Subject: one\r\n\r\n.dot\r\n", b"Subject: two\r\n\r\n" + b"line\r\n" * 2000]
        relay.read_spool()
        for body in bodies:
            relay.send(body)
        customer = self.primary().start()
        said = self.fetch(self.RC % ("127.0.0.1", port, customer.port))
        wait(relay.is_empty, "an empty spool after\n" + said)
        self.assertEqual([without_received(data) for _, _, data in customer.messages], bodies)

        def is_over() -> bool:
            status = relay.json("--status")
            return (status["connections"], status["spool"]["messages"]) == (0, 0)
        wait(is_over, "the end of the connection and of the queue")
        self.assertIn("You have no mail", self.fetch(self.RC % ("127.0.0.1", port, customer.port)))

    def test_its_authenticated_etrn_tells_where_the_primary_is(self) -> None:
        customer = self.primary().start()
        relay = self.relay("etrn", domain=LOGIN_OPTIONS + "\n[domain other.example]\nprimary = etrn\n" + LOGIN_OPTIONS,
                           SMTP_PORT=customer.port)
        relay.send(recipients=["u@" + DOMAIN, "u@other.example"])
        said = self.fetch('poll 127.0.0.1 protocol ETRN port %d esmtpname "gw" esmtppassword "se cret" '
                          "fetchdomains ourdom.example other.example" % relay.port)
        wait(relay.is_empty, "an empty spool after\n" + said)
        relay.logged(r"etrn: site=other\.example, client=unknown\[127\.0\.0\.1\], messages=1, reply=253")

    def test_it_collects_a_queue_from_behind_nat(self) -> None:
        """A provider, a router that translates addresses, and a customer nobody can connect to."""
        names = ["etrn%d%s" % (os.getpid(), part) for part in "prc"]
        make_nat(self, *names)
        provider, _, customer_net = names
        relay = Relay(self.folder, "atrn", relay="odmr_listen = 198.51.100.1:366", domain=LOGIN_OPTIONS)
        relay.prefix = ["ip", "netns", "exec", provider]
        self.addCleanup(relay.__exit__)
        relay.start()
        for _ in range(3):
            self.assertIn("queued", within(provider, relay.send))
        relay.read_spool()
        for address in cases(self, ["10.77.0.2", "198.51.100.2"]):      # the customer, and what it looks like from outside
            with self.assertRaises(OSError):
                within(provider, lambda address=address: socket.create_connection((address, 25), 0.3))
        customer = within(customer_net, Primary)
        self.addCleanup(customer.__exit__)
        customer.start()
        said = self.fetch(self.RC % ("198.51.100.1", 366, customer.port), "ip", "netns", "exec", customer_net)
        wait(relay.is_empty, "an empty spool after\n" + said)
        self.assertEqual(len(customer.messages), 3)
        relay.logged(r"relay=\S+\[198\.51\.100\.2\]:\d+, .*status=sent")


def within(name: str, what: Callable[[], Any]) -> Any:
    """Do something in a network namespace: a thread of its own goes there.  Sockets stay where they were made."""
    out: List[Any] = []

    def go() -> None:
        with open("/var/run/netns/" + name, "rb") as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0x40000000):      # CLONE_NEWNET
                raise OSError(ctypes.get_errno(), "setns")
        try:
            out.append(what())
        except OSError as error:
            out.append(error)
    thread = threading.Thread(target=go)
    thread.start()
    thread.join()
    if isinstance(out[0], OSError):
        raise out[0]
    return out[0]


def make_nat(test: unittest.TestCase, provider: str, router: str, customer: str) -> None:
    """Three network namespaces: 198.51.100.1 - 198.51.100.2 router 10.77.0.1 - 10.77.0.2.  Skips where that cannot be."""
    for program in ("ip", "nft"):
        if shutil.which(program) is None:
            test.skipTest("%s is not installed" % program)
    if os.geteuid() != 0:
        test.skipTest("network namespaces need root")

    def do(line: str) -> None:
        done = subprocess.run(line.split(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            test.skipTest("%s: %s" % (line, done.stdout.decode().strip()))
    for name in (provider, router, customer):
        do("ip netns add " + name)
        test.addCleanup(subprocess.run, ["ip", "netns", "del", name], check=False)
        do("ip -n %s link set lo up" % name)
    for number, (one, other, its, others) in enumerate([(provider, router, "198.51.100.1", "198.51.100.2"),
                                                        (customer, router, "10.77.0.2", "10.77.0.1")]):
        do("ip -n %s link add v%d type veth peer name w%d netns %s" % (one, number, number, other))
        for name, link, address in ((one, "v", its), (other, "w", others)):
            do("ip -n %s address add %s/24 dev %s%d" % (name, address, link, number))
            do("ip -n %s link set %s%d up" % (name, link, number))
    do("ip -n %s route add default via 10.77.0.1" % customer)
    do("ip netns exec %s sysctl -q -w net.ipv4.ip_forward=1" % router)
    do("ip netns exec %s nft add table ip nat" % router)
    do("ip netns exec %s nft add chain ip nat out { type nat hook postrouting priority 100 ; }" % router)
    do("ip netns exec %s nft add rule ip nat out oifname w0 masquerade" % router)


class Promise(Relays):
    """Every 250 arrives, whoever is killed and when."""

    def send_until_killed(self, relay: Relay, ledger: List[bytes], enough: int) -> None:
        """Four clients send; each mark in the ledger was answered 250.  The relay is killed after so many."""
        goal = len(ledger) + enough

        def send(number: int) -> None:
            with contextlib.suppress(OSError, IndexError):
                with relay.client() as client:
                    for count in itertools.count():
                        mark = b"%d-%d-%d" % (goal, number, count)
                        if client.send(b"Subject: %s\r\n\r\n%s\r\n" % (mark, mark * 100))[:3] != "250":
                            return
                        ledger.append(mark)
        threads = [threading.Thread(target=send, args=(number,), daemon=True) for number in range(4)]
        for thread in threads:
            thread.start()
        wait(lambda: len(ledger) >= goal, "%d messages" % enough)
        self.assertEqual(relay.end(signal.SIGKILL), -signal.SIGKILL)
        for thread in threads:
            thread.join(DEADLINE_S)

    def check(self, primary: Primary, relay: Relay, ledger: List[bytes]) -> None:
        wait(relay.is_empty, "an empty spool")
        found = collections.Counter(re.search(rb"Subject: (\S+)", data).group(1) for _, _, data in primary.messages)
        self.assertEqual([mark for mark in ledger if not found[mark]], [])
        for _, _, data in primary.messages:
            mark = re.search(rb"Subject: (\S+)", data).group(1)
            self.assertEqual(without_received(data), b"Subject: %s\r\n\r\n%s\r\n" % (mark, mark * 100))
        self.assertEqual(os.listdir(os.path.join(relay.spool, "corrupt")), [])

    def test_killed_while_receiving(self) -> None:
        primary = self.primary()
        relay = self.relay(primary)
        ledger: List[bytes] = []
        for enough in (7, 40, 23):
            self.send_until_killed(relay, ledger, enough)
            relay.start()
        primary.start()
        self.check(primary, relay, ledger)

    def test_killed_while_delivering(self) -> None:
        primary = self.primary()
        relay = self.relay(primary, domain="connections = 2", UNRECORDED_MAX=10, JOBS_PER_CONNECTION=4, JOBS_REFILL=2)
        ledger: List[bytes] = []
        self.send_until_killed(relay, ledger, 120)
        relay.start()
        primary.start()
        for goal in (5, 40, 80):
            wait(lambda goal=goal: len(primary.messages) >= goal or relay.is_empty())
            relay.end(signal.SIGKILL)
            relay.start()
        self.check(primary, relay, ledger)
        # At each kill: what the disk had not taken, and what two connections had been given.
        self.assertLessEqual(len(primary.messages), len(ledger) + 3 * (10 + 2 * (4 + 2)))

    def test_killed_while_both(self) -> None:
        primary = self.primary().start()
        relay = self.relay(primary)
        ledger: List[bytes] = []
        for enough in (30, 60):
            self.send_until_killed(relay, ledger, enough)
            relay.start()
        self.check(primary, relay, ledger)

    def test_a_primary_that_dies_in_between_loses_nothing(self) -> None:
        primary = self.primary().start()
        relay = self.relay(primary)
        ledger = [b"%d" % number for number in range(60)]
        with relay.client() as client:
            for number, mark in enumerate(ledger):
                self.assertEqual(client.send(b"Subject: %s\r\n\r\n%s\r\n" % (mark, mark * 100))[:3], "250")
                if number % 20 == 10:
                    primary.stop()
                if number % 20 == 15:
                    primary.start()
        self.check(primary, relay, ledger)


class Bounces(Relays):
    """Notices to senders; a scripted primary plays the smarthost."""

    def setUp(self) -> None:
        super().setUp()
        self.sink = self.primary().start()

    def notices(self, count: int = 1) -> List[Any]:
        wait(lambda: len(self.sink.messages) >= count, "%d notices" % count)
        return [email.message_from_bytes(data, policy=email.policy.default) for _, _, data in self.sink.messages]

    def relay_to_sink(self, primary: Any, **options: Any) -> Relay:
        return self.relay(primary, smarthost=self.sink.address, **options)

    def test_expired_mail_is_returned_to_its_sender(self) -> None:
        relay = self.relay_to_sink(self.primary(), domain="lifetime = 1s")
        relay.send(b"Subject: lost\r\nX: y\r\n\r\nsecret\r\n", parameters=" ENVID=QQ1 RET=HDRS",
                   recipients=["<u@%s> ORCPT=rfc822;old@x.example" % DOMAIN, "<v@%s> NOTIFY=NEVER" % DOMAIN])
        notice, = self.notices()
        self.assertEqual(self.sink.messages[0][:2], ("", ["a@sender.example"]))
        self.assertEqual((notice.get_content_type(), notice["Auto-Submitted"]), ("multipart/report", "auto-replied"))
        _, status, headers = notice.iter_parts()
        whole, one = status.get_payload()
        self.assertEqual(whole["Original-Envelope-Id"], "QQ1")
        self.assertEqual((one["Action"], one["Status"], one["Final-Recipient"], one["Original-Recipient"]),
                         ("failed", "4.4.7", "rfc822; u@" + DOMAIN, "rfc822; old@x.example"))
        self.assertIn("Connection refused", one["Diagnostic-Code"])
        self.assertIn("Subject: lost", headers.get_content())
        self.assertNotIn("secret", self.sink.messages[0][2].decode())
        wait(relay.is_empty, "an empty spool")
        relay.logged(r"smtp\[\d+\]: [0-9A-F]+: to=<u@ourdom\.example>, .*status=expired \(")
        relay.logged(r"bounce\[\d+\]: [0-9A-F]+: sender non-delivery notification: [0-9A-F]+")

    def test_mail_without_a_sender_is_never_answered(self) -> None:
        relay = self.relay_to_sink(self.primary(), domain="lifetime = 1s")
        relay.send(sender="")
        relay.send(recipients=["<u@%s> NOTIFY=NEVER" % DOMAIN])
        relay.logged("double bounce")
        wait(lambda: relay.json("--status")["domains"][DOMAIN]["expired"] == 2, "both to expire")
        wait(relay.is_empty, "an empty spool")
        self.assertEqual(self.sink.messages, [])

    def test_a_notice_that_cannot_be_delivered_goes_to_the_postmaster(self) -> None:
        self.sink.script["RCPT"] = lambda argument: "250 ok" if "postmaster@" in argument else "550 5.1.1 no such user"
        relay = self.relay_to_sink(self.primary(), domain="lifetime = 1s", bounces="postmaster = postmaster@x.example")
        relay.send()
        notice, = self.notices()
        self.assertEqual(self.sink.messages[0][:2], ("", ["postmaster@x.example"]))
        self.assertIn(b"a@sender.example", self.sink.messages[0][2])
        wait(relay.is_empty, "an empty spool")
        self.assertIsNotNone(notice["Message-ID"])

    def test_a_refusal_is_kept_for_the_grace_and_then_returned(self) -> None:
        primary = self.primary(RCPT="550 5.1.1 no such user").start()
        relay = self.relay_to_sink(primary, domain="recovery_grace = 1s\nretry_interval = 1s")
        relay.send()
        wait(lambda: primary.uses["RCPT"], "the first try")
        self.assertEqual((self.sink.messages, len(relay.files())), ([], 2))
        notice, = self.notices()
        one = list(notice.iter_parts())[1].get_payload()[1]
        self.assertEqual((one["Status"], one["Diagnostic-Code"], one["Remote-MTA"]),
                         ("5.1.1", "smtp; 550 5.1.1 no such user", "dns; 127.0.0.1"))
        self.assertGreaterEqual(primary.uses["RCPT"], 2)
        wait(relay.is_empty, "an empty spool")
        relay.logged("status=bounced")

    def test_a_server_that_comes_back_half_configured_loses_nobodys_mail(self) -> None:
        primary = self.primary(RCPT="550 5.1.1 no such user")
        relay = self.relay_to_sink(primary, domain="recipients = verify\ncutthrough = yes\nretry_interval = 1s")
        for number in range(5):
            relay.send(recipients=["u%d@%s" % (number, DOMAIN)])
        relay.logged(": down: ")
        primary.start()
        relay.logged(r"primary\[\d+\]: warning: ourdom\.example: rejecting: 550 5\.1\.1 no such user, 5 messages waiting")
        status = relay.json("--status")["domains"][DOMAIN]
        self.assertEqual((status["primary"], status["queued"], status["bounced"]), ("rejecting", 5, 0))
        for number in range(6):         # nor is anybody turned away at the door
            self.assertEqual(relay.send(recipients=["u%d@%s" % (number, DOMAIN)])[:3], "250")
        primary.script.clear()
        wait(relay.is_empty, "an empty spool")
        relay.logged(r": up after rejecting for \d+s, 11 messages waiting")
        self.assertEqual((len(primary.messages), self.sink.messages), (11, []))

    def test_a_hostile_answer_makes_a_harmless_notice(self) -> None:
        said = b"550-5.1.1 a\r\n550-5.1.1 Bcc: v@x.example\r\n550-5.1.1 \x1b[2J\xff\x00\r\n550 5.1.1 \r\n"
        primary = self.primary(RCPT=said).start()
        relay = self.relay_to_sink(primary, domain="recovery_grace = 0s")
        relay.send()
        notice, = self.notices()
        self.assertIsNone(notice["Bcc"])
        self.assertEqual(len(list(notice.iter_parts())), 3)
        self.assertIsNone(re.search(rb"(?mi)^bcc:|[\x00\x1b\xff]", self.sink.messages[0][2]))
        wait(relay.is_empty, "an empty spool")
        self.assertTrue(all(line.isprintable() for line in relay.log))

    def test_an_operator_returns_mail(self) -> None:
        relay = self.relay_to_sink(self.primary())
        relay.send()
        relay.logged(": down: ")
        wait(lambda: relay.queue()[0]["state"] == "queued", "it to be at rest")
        self.assertEqual(wait(lambda: relay.run("--bounce", DOMAIN)[0] == 0), True)
        notice, = self.notices()
        self.assertEqual(list(notice.iter_parts())[1].get_payload()[1]["Status"], "5.0.0")
        wait(relay.is_empty, "an empty spool")


class Webhook(socketserver.ThreadingTCPServer):
    """Takes HTTP requests; `bodies` are those of its POSTs."""
    daemon_threads = True

    def __init__(self, status: str = "200 OK") -> None:
        self.status = status
        self.bodies: List[bytes] = []
        super().__init__(("127.0.0.1", 0), self.answer)         # type: ignore[arg-type]
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, sock: socket.socket, *_: Any) -> None:
        with sock.makefile("rb") as lines:
            head = list(iter(lines.readline, b"\r\n"))
            size = next(int(line.split(b":")[1]) for line in head if line.lower().startswith(b"content-length"))
            self.bodies.append(lines.read(size))
            sock.sendall(b"HTTP/1.1 %s\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % self.status.encode())


class Alerting(Relays):
    """People are told: a program, a web hook, a mail."""

    def test_an_outage_its_end_and_a_refusal_reach_program_web_hook_and_mail(self) -> None:
        primary, sink = self.primary(), self.primary().start()
        told = os.path.join(self.folder, "told")
        program = os.path.join(self.folder, "tell me.sh")
        with open(program, "w", encoding="ascii") as file:
            file.write("#!/bin/sh\nexec >> \"$1\"\nprintf '%s %s %s ' \"$ETRN_EVENT\" \"$ETRN_DOMAIN\" \"$ETRN_WAITING\"\n"
                       "cat\necho\n")
        os.chmod(program, 0o700)
        with Webhook() as hook:
            self.addCleanup(hook.shutdown)
            relay = self.relay(primary, domain="[alerts]\nafter = 0s\ncommand = '%s' %s\nwebhook = http://127.0.0.1:%d/x\n"
                               "mail = admin@home.example\nmail_route = %s" % (
                                   program, told, hook.server_address[1], sink.address))
            for _ in range(3):
                relay.send()
            wait(lambda: len(hook.bodies) == 1, "the alert")
            primary.script["RCPT"] = "550 5.1.1 \x1b[2J nobody"
            primary.start()
            wait(lambda: len(hook.bodies) == 3, "two more")
            primary.script.clear()
            wait(lambda: len(hook.bodies) == 4 and len(sink.messages) == 4, "the last")
            alerts = [json.loads(body) for body in hook.bodies]
            self.assertEqual([(one["event"], one["domain"]) for one in alerts],
                             [("down", DOMAIN), ("up", DOMAIN), ("rejecting", DOMAIN), ("up", DOMAIN)])
            self.assertEqual([one["waiting"] for one in alerts[1:3]], [3, 3])
            self.assertRegex(alerts[0]["text"], "Connection refused")
            self.assertRegex(alerts[1]["text"], r"up after \d+s, 3 messages waiting")
            self.assertTrue(all(one["text"].isprintable() and one["host"] == "backup.example.net" for one in alerts))
            wait(lambda: open(told, encoding="utf-8").read().count("\n") == 4, "the program")
            with open(told, encoding="utf-8") as file:
                for line, alert in zip(file, alerts):
                    event, domain, waiting, body = line.split(" ", 3)
                    self.assertEqual((event, domain, int(waiting)), (alert["event"], DOMAIN, alert["waiting"]))
                    self.assertEqual(json.loads(body)["text"], alert["text"])
            for (sender, recipients, data), alert in zip(sink.messages, alerts):
                mail = email.message_from_bytes(data, policy=email.policy.strict)
                self.assertEqual((sender, recipients, mail["Auto-Submitted"]), ("", ["admin@home.example"], "auto-generated"))
                self.assertIn("%s %s" % (DOMAIN, alert["event"]), mail["Subject"])
            wait(relay.is_empty, "an empty spool")

    def test_a_command_that_fails_is_told_without_its_words_and_a_hook_that_hangs_does_not_hold_it_up(self) -> None:
        primary = self.primary()
        with socket.socket() as hook:
            hook.bind(("127.0.0.1", 0))
            hook.listen(8)
            relay = self.relay(primary, domain="[alerts]\nafter = 0s\ncommand = sh -c 'exit 3' secret\nwebhook = http://127.0.0.1:%d/"
                               % hook.getsockname()[1])
            relay.send()
            relay.logged("alert not told by command: exit status 3$")
            since = len(relay.log)
            primary.start()
            relay.logged("alert not told by command: exit status 3$", since)        # of its return
            self.assertEqual([line for line in relay.log if "secret" in line], [])

    def test_alerts_that_cannot_be_told_are_logged_and_hold_nothing_up(self) -> None:
        primary = self.primary()
        with Webhook("500 no") as hook:
            self.addCleanup(hook.shutdown)
            relay = self.relay(primary, domain="[alerts]\nafter = 0s\ncommand = /nowhere/program\nwebhook = http://127.0.0.1:%d/"
                               % hook.server_address[1])
            relay.send()
            relay.logged("error: alert not told by command: .*No such file")
            relay.logged("error: alert not told by webhook: .*500")
            primary.start()
            wait(relay.is_empty, "an empty spool")


class Signed(Relays):
    """A signature made by somebody else's program holds behind us."""

    def test_a_dkim_signed_message_verifies_after_the_passage(self) -> None:
        openssl = shutil.which("openssl")
        if not openssl:
            self.skipTest("no openssl program")
        key, public = os.path.join(self.folder, "key.pem"), os.path.join(self.folder, "public.pem")
        for command in (["genrsa", "-out", key, "2048"], ["rsa", "-in", key, "-pubout", "-out", public]):
            subprocess.run([openssl, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        primary = self.primary().start()
        relay = self.relay(primary)
        body = (b".\r\n..two\r\n \t trailing blanks \t\r\ncaf\xe9 \xff\r\n" + b"x" * 3000 + b"\r\n\r\nFrom me\r\n\r\n\r\n")
        header = b"From:  A  <a@sender.example>\r\nSubject: folded\r\n\tand   spaced\r\nReceived: from elsewhere\r\n"
        field = (b"DKIM-Signature: v=1; a=rsa-sha256; c=simple/simple; d=sender.example; s=x;\r\n\th=from:subject; bh=%s;\r\n\tb="
                 % self.digest(body))
        signature = subprocess.run([openssl, "dgst", "-sha256", "-sign", key], input=self.signed(header, field), check=True,
                                   stdout=subprocess.PIPE).stdout
        data = field + base64.b64encode(signature) + b"\r\n" + header + b"\r\n" + body
        with relay.client() as wire:
            self.assertEqual(wire.send(data, parameters=" BODY=8BITMIME")[:3], "250")
            wire.say("MAIL FROM:<a@sender.example>", "RCPT TO:<user@%s>" % DOMAIN)
            for part, last in ((data[:777], ""), (data[777:], " LAST")):
                wire.raw(b"BDAT %d%s\r\n" % (len(part), last.encode()) + part)
                self.assertEqual(wire.reply()[:3], "250")
        wait(lambda: len(primary.messages) == 2, "both")
        for _, _, arrived in primary.messages:
            self.assertTrue(arrived.startswith(b"Received: "))
            arrived = without_received(arrived)
            self.assertEqual(arrived, data)
            head, _, rest = arrived.partition(b"\r\n\r\n")
            mine = re.match(rb"(DKIM-Signature:.*?\r\n\tb=)([A-Za-z0-9+/=]+)\r\n", head, re.S)
            assert mine is not None
            self.assertIn(b"bh=%s;" % self.digest(rest), mine.group(1))
            sig = os.path.join(self.folder, "sig")
            with open(sig, "wb") as file:
                file.write(base64.b64decode(mine.group(2)))
            verdict = subprocess.run([openssl, "dgst", "-sha256", "-verify", public, "-signature", sig],
                                     input=self.signed(head[mine.end():] + b"\r\n", mine.group(1)), stdout=subprocess.PIPE)
            self.assertIn(b"Verified OK", verdict.stdout)

    @staticmethod
    def digest(body: bytes) -> bytes:
        """RFC 6376 3.4.3: blank lines at the end count as none."""
        return base64.b64encode(hashlib.sha256(body.rstrip(b"\r\n") + b"\r\n").digest())

    @staticmethod
    def signed(header: bytes, field: bytes) -> bytes:
        """RFC 6376 3.7: the fields as they are, then the signature's own, empty and without its line end."""
        fields = re.findall(rb"(?:From|Subject):[^\r]*(?:\r\n[ \t][^\r]*)*\r\n", header)
        return b"".join(fields) + field


class Postfix:
    """A private Postfix as the primary: its own folders, a port of its own, a mailbox for everybody."""
    DAEMONS = "/usr/lib/postfix/sbin"
    MASTER = "/usr/share/postfix/master.cf.dist"

    @classmethod
    def missing(cls) -> str:
        """Why there can be none here."""
        if os.geteuid():
            return "needs root"
        has = shutil.which("postfix") and os.path.exists(cls.MASTER) and os.path.isdir(cls.DAEMONS)
        return "" if has else "needs Debian's postfix"

    def __init__(self, folder: str) -> None:
        self.folder, self.etc, self.mail = folder, os.path.join(folder, "etc"), os.path.join(folder, "mail")
        for name in (self.etc, self.mail, *(os.path.join(folder, name) for name in ("spool", "data", "log"))):
            os.mkdir(name)
        with open(os.path.join(folder, "log", "mail.log"), "x", encoding="ascii"):
            pass
        for name in ("data", "log", "log/mail.log"):        # postsuper, which tells of half-made files, is not root
            shutil.chown(os.path.join(folder, name), "postfix")
        shutil.chown(self.mail, "nobody")
        self.port = unused_port()
        nobody = pwd.getpwnam("nobody")
        with open(os.path.join(self.etc, "main.cf"), "w", encoding="ascii") as file:
            file.write("""compatibility_level = 3.6
queue_directory = %(folder)s/spool
data_directory = %(folder)s/data
command_directory = /usr/sbin
daemon_directory = %(daemons)s
mail_owner = postfix
setgid_group = postdrop
myhostname = mail.%(domain)s
mydestination =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mynetworks =
virtual_mailbox_domains = %(domain)s
virtual_mailbox_maps = inline:{user@%(domain)s=box/}
virtual_mailbox_base = %(folder)s/mail
virtual_uid_maps = static:%(uid)d
virtual_gid_maps = static:%(gid)d
smtpd_client_connection_count_limit = 0
smtpd_authorized_xclient_hosts = 127.0.0.1
smtpd_peername_lookup = no
maillog_file = %(folder)s/log/mail.log
maillog_file_prefixes = %(folder)s
alias_maps =
notify_classes =
queue_run_delay = 1s
minimal_backoff_time = 1s
maximal_backoff_time = 1s
transport_retry_time = 1s
""" % {"folder": folder, "daemons": self.DAEMONS, "domain": DOMAIN, "uid": nobody.pw_uid, "gid": nobody.pw_gid})
        with open(self.MASTER, encoding="ascii") as file:
            text = re.sub(r"(?m)^smtp(\s+inet\s)", r"%d\1" % self.port, file.read())
        with open(os.path.join(self.etc, "master.cf"), "w", encoding="ascii") as file:
            file.write(re.sub(r"(?m)^(\S+\s+(?:unix|inet|fifo)\s+\S+\s+\S+\s+)y", r"\1n", text))

    def start(self) -> None:
        done = self.command("start")
        with open(os.path.join(self.folder, "log", "mail.log"), encoding="utf-8", errors="replace") as file:
            assert done.returncode == 0, file.read()[-3000:]

    def command(self, word: str) -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run(["postfix", "-c", self.etc, word], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def arrived(self) -> List[str]:
        folder = os.path.join(self.mail, "box", "new")
        return os.listdir(folder) if os.path.isdir(folder) else []

    def subjects(self) -> List[str]:
        out = []
        for name in self.arrived():
            with open(os.path.join(self.mail, "box", "new", name), "rb") as file:
                out.append(email.message_from_binary_file(file)["Subject"])
        return out


@unittest.skipIf(Postfix.missing(), Postfix.missing())
class RealPrimary(Relays):
    """Postfix stands where the primary does."""

    def postfix(self) -> Postfix:
        folder = tempfile.mkdtemp(prefix="etrn-postfix-")
        self.addCleanup(shutil.rmtree, folder, True)
        os.chmod(folder, 0o755)
        postfix = Postfix(folder)
        self.addCleanup(postfix.command, "stop")
        return postfix

    @staticmethod
    def load(relay: Relay, numbers: Iterable[int]) -> None:
        with relay.client() as wire:
            for number in numbers:
                reply = wire.send(b"Subject: %d\r\n\r\n%s" % (number, b"line of a message\r\n" * 50))
                assert reply[:3] == "250", reply

    def test_a_postfix_stopped_and_started_under_load_gets_each_message_once(self) -> None:
        postfix = self.postfix()
        relay = self.relay("127.0.0.1:%d" % postfix.port, domain="connections = 2")
        self.load(relay, range(40))
        relay.logged(": down: ")
        postfix.start()
        began = time.monotonic()
        pool = concurrent.futures.ThreadPoolExecutor(1)
        self.addCleanup(pool.shutdown)
        loading = pool.submit(self.load, relay, range(40, 120))
        wait(lambda: len(postfix.arrived()) >= 40, "what waited")
        self.assertLess(time.monotonic() - began, 10)
        since = len(relay.log)
        postfix.command("stop")
        self.load(relay, range(120, 160))
        relay.logged(": down: ", since)
        postfix.start()
        loading.result(DEADLINE_S)
        wait(relay.is_empty, "an empty spool")
        wait(lambda: len(set(postfix.subjects())) == 160, "all of them in the mailbox", 2 * DEADLINE_S)
        copies = collections.Counter(map(int, postfix.subjects()))
        self.assertEqual(sorted(copies), list(range(160)))
        # "postfix stop" cuts two connections; what it took of a window without having said so comes again.
        self.assertLessEqual(sum(copies.values()) - len(copies), 2 * etrn.CHUNK_MESSAGES)

    def test_postfix_sees_the_original_client_by_xclient(self) -> None:
        postfix = self.postfix()
        postfix.start()
        relay = self.relay("127.0.0.1:%d" % postfix.port, domain="xclient = yes")
        for _ in range(2):
            with relay.client("EHLO odd+name=x.example") as wire:
                self.assertEqual(wire.send(b"Subject: 1\r\n\r\nx\r\n")[:3], "250")
        wait(lambda: len(postfix.arrived()) == 2, "both")
        for name in postfix.arrived():
            with open(os.path.join(postfix.mail, "box", "new", name), encoding="ascii") as file:
                received = email.message_from_file(file).get_all("Received", [])[0]
            self.assertIn("from odd+name=x.example (unknown [127.0.0.1])", " ".join(received.split()))


class Routes(Relays):
    """Relays that find their primary in a scripted DNS; every host has the same port on an address of its own."""

    def mx_relay(self, dns: Dns, number: int, hostname: str, **options: Any) -> Relay:
        """A relay that is MX host 127.0.0.NUMBER, and takes our mail on another port."""
        relay = Relay(os.path.join(self.folder, str(number)), "mx", **options)
        relay.limits["SMTP_PORT"] = self.port
        return self.begin(relay, "127.0.0.1:0, 127.0.0.%d:%d" % (number, self.port), hostname, dns)

    def begin(self, relay: Relay, listen: str, hostname: str, dns: Dns) -> Relay:
        with open(relay.file, encoding="utf-8") as file:
            text = file.read().replace("127.0.0.1:0", listen).replace("backup.example.net", hostname)
        with open(relay.file, "w", encoding="utf-8") as file:
            file.write(text.replace("127.0.0.1:9", str(dns.endpoint)))
        self.addCleanup(relay.__exit__)
        return relay.start()

    def setUp(self) -> None:
        super().setUp()
        self.mail = self.primary()
        self.port = self.mail.port
        for number in (2, 3):
            os.mkdir(os.path.join(self.folder, str(number)))
        self.zone: Dict[Tuple[str, int], List[Any]] = {
            (DOMAIN, etrn.MX): [(10, "mail.example"), (20, "a.example"), (20, "b.example")],
            ("mail.example", etrn.A): ["127.0.0.1"], ("a.example", etrn.A): ["127.0.0.2"], ("b.example", etrn.A): ["127.0.0.3"]}

    def test_two_relays_of_equal_preference_never_exchange_mail_and_both_deliver(self) -> None:
        with Dns(self.zone) as dns:     # one is known by its name, the other by its address alone
            relays = [self.mx_relay(dns, 2, "a.example"), self.mx_relay(dns, 3, "unlisted.example")]
            for number in range(6):
                self.assertEqual(relays[number % 2].send(b"Subject: %d\r\n\r\n" % number)[:3], "250")
            for relay in relays:
                relay.logged(r": down: connect to mail\.example\[127\.0\.0\.1\]:\d+: Connection refused")
                relay.run("--flush", DOMAIN)
                self.assertEqual(len(relay.queue()), 3)
            self.zone[DOMAIN, etrn.MX] = self.zone[DOMAIN, etrn.MX][1:]         # the two alone are left
            for relay in relays:
                wait(lambda relay=relay: "loops back to this host" in "".join(relay.run("--flush", DOMAIN)[1:]), "the loop")
                self.assertEqual(len(relay.queue()), 3)
            self.zone[DOMAIN, etrn.MX] = [(10, "mail.example"), *self.zone[DOMAIN, etrn.MX]]
            self.mail.start()
            for relay in relays:
                relay.signal(signal.SIGUSR1)
                wait(relay.is_empty, "an empty spool")
            subjects = sorted(re.search(rb"Subject: (\d)", data).group(1) for _, _, data in self.mail.messages)   # type: ignore
            self.assertEqual(subjects, [b"%d" % number for number in range(6)])
            for relay in relays:
                self.assertEqual(relay.end(), 0)        # its log is whole then
                self.assertEqual(sum(": client=" in line for line in relay.log), 3)

    def test_the_last_route_serves_when_the_dns_dies_even_after_a_restart(self) -> None:
        self.mail.start()
        with Dns(self.zone) as dns:
            relay = self.mx_relay(dns, 2, "a.example", DNS_TOTAL_S=0.3, DNS_TRY_S=0.1)
            relay.send()
            wait(lambda: self.mail.messages, "the first")
            wait(relay.is_empty, "an empty spool")
            self.assertEqual(relay.end(), 0)
            for dead in cases(self, ["silent", "no such name"]):
                if dead == "silent":
                    dns.mangle = lambda packet: None
                else:
                    dns.mangle = lambda packet: packet
                    self.zone.clear()
                self.mail.messages.clear()
                relay.start()
                relay.send()
                wait(lambda: self.mail.messages, "mail by the remembered route")
                relay.logged("using the route that worked last")
                self.assertEqual(relay.end(), 0)


# == 12. COMMANDS ==============================================================
# The command line, with a running relay and on the spool alone.

class Commands(Relays):
    def both(self, **options: Any) -> Iterator[Relay]:
        """A relay with two messages and a primary that is down: running, then stopped."""
        for running in (True, False):
            self.down = self.primary()
            relay = self.relay(self.down, **options)
            relay.send(b"From x\r\nSubject: one\r\n\r\nFrom here\r\n>From there\r\n", sender="one@x.example")
            relay.send(b"Subject: two\r\n\r\n", sender="", recipients=["a@" + DOMAIN, "b@" + DOMAIN])
            relay.logged(": down: ")
            if not running:
                self.assertEqual(relay.end(), 0)
            self.running = running
            yield relay

    def test_queue_lists_as_the_contract_says(self) -> None:
        for relay in self.both():
            first, second = relay.queue()
            self.assertEqual(sorted(first), sorted(["id", "domain", "state", "sender", "size", "received", "expires",
                                                    "next_attempt", "client", "recipients"]))
            self.assertEqual((first["domain"], first["state"], first["sender"], second["sender"]),
                             (DOMAIN, "queued", "one@x.example", ""))
            self.assertEqual(first["size"], os.path.getsize(os.path.join(relay.spool, first["id"] + ".eml")))
            self.assertEqual(first["client"], {"address": "127.0.0.1", "helo": "client.example", "tls": None})
            self.assertAlmostEqual(first["expires"] - first["received"], 7 * 86400, delta=1)
            self.assertEqual([one["address"] for one in second["recipients"]], ["a@" + DOMAIN, "b@" + DOMAIN])
            self.assertEqual(sorted(second["recipients"][0]), ["address", "attempts", "last_response"])
            code, text, _ = relay.run("--queue", DOMAIN)
            self.assertEqual((code, first["id"] in text, second["id"] in text), (0, True, True))
            self.assertEqual(relay.run("--queue", "other.example")[0], 1)

    def test_status_tells_as_the_contract_says(self) -> None:
        for relay in self.both():
            status = relay.json("--status")
            for name in ("version", "pid", "uptime", "connections", "spool", "domains"):
                self.assertIn(name, status)
            assert relay.process is not None
            self.assertEqual(status["pid"], relay.process.pid if self.running else None)
            self.assertEqual({name: status["spool"][name] for name in ("messages", "held", "corrupt")},
                             {"messages": 2, "held": 0, "corrupt": 0})
            one = status["domains"][DOMAIN]
            for name in cases(self, ["primary", "since", "queued", "bytes", "oldest", "accepted", "delivered", "bounced",
                                     "deferred", "expired", "last_error",
                                     "next_probe"]):
                self.assertIn(name, one)
            self.assertEqual((one["queued"], one["accepted"], one["delivered"]), (2, 2, 0))
            if self.running:
                self.assertEqual(one["primary"], "down")
                self.assertIn("Connection refused", one["last_error"])
            code, text, _ = relay.run("--status")
            self.assertEqual((code, DOMAIN in text), (0, True))

    def test_show_tells_envelope_header_and_message(self) -> None:
        for relay in self.both():
            id = relay.queue()[0]["id"]
            code, text, _ = relay.run("--show", id)
            self.assertEqual((code, "one@x.example" in text, "Subject: one" in text), (0, True, True))
            with open(os.path.join(relay.spool, id + ".eml"), "rb") as file:
                self.assertEqual(relay.run("--show", id.lower(), "--raw"), (0, file.read().decode(), ""))
            self.assertEqual(relay.json("--show", id)["sender"], "one@x.example")
            self.assertEqual(relay.run("--show", "ABCDEF12")[0], 1)

    def test_hold_and_release_one_message_and_a_domain(self) -> None:
        for relay in self.both():
            ids = [row["id"] for row in relay.queue()]
            for command, what, states in cases(self, [
                    ("--hold", ids[0], ["held", "queued"]), ("--release", ids[0], ["queued"] * 2),
                    ("--hold", DOMAIN, ["held"] * 2),
                    ("--release", DOMAIN, ["queued"] * 2), ("--hold", "all", ["held"] * 2),
                    ("--release", "all", ["queued"] * 2)]):
                self.assertEqual(relay.run(command, what)[0], 0)
                self.assertEqual([row["state"].replace("delivering", "queued") for row in relay.queue()], states)
            self.assertEqual(relay.run("--hold", "ABCDEF12")[0], 1)
            self.assertEqual(relay.run("--release", "other.example")[0], 1)

    def test_a_held_domain_holds_later_mail_too(self) -> None:
        relay = self.relay(self.primary().start())
        self.assertEqual(relay.run("--hold", DOMAIN)[0], 0)
        relay.send()
        self.assertEqual([row["state"] for row in relay.queue()], ["held"])
        self.assertEqual(relay.run("--flush", DOMAIN)[0], 75)
        relay.run("--release", DOMAIN)
        wait(relay.is_empty, "an empty spool")

    def test_flush_waits_and_tells_what_became_of_the_mail(self) -> None:
        for relay in self.both():
            self.assertEqual(relay.run("--flush", DOMAIN)[0], 69)
            self.assertEqual(len(relay.files()), 4)
            self.down.script["RCPT"] = "450 4.2.0 later"
            self.down.start()
            wait(lambda relay=relay: relay.run("--flush", DOMAIN)[0] == 75, "its mail to be deferred")
            self.assertEqual(len(relay.files()), 4)
            self.down.script.clear()
            answer = relay.run("--flush", "@" + DOMAIN, "--json")
            self.assertEqual(answer[0], 0, answer)
            shown = json.loads(answer[1])
            self.assertEqual((shown["queued"], shown["delivered"], shown["waiting"]), (2, 2, 0))
            self.assertEqual((len(self.down.messages), relay.files()), (2, []))
            self.assertEqual(relay.run("--flush", "all")[0], 0)
            self.assertEqual(relay.run("--flush", "other.example")[0], 1)

    def test_delete_removes_one_or_all_but_asks_before_all(self) -> None:
        for relay in self.both():
            first, second = (row["id"] for row in relay.queue())
            wait(lambda relay=relay, first=first: relay.run("--delete", first)[0] == 0)
            self.assertEqual([row["id"] for row in relay.queue()], [second])
            self.assertEqual(relay.run("--delete", first)[0], 1)
            self.assertEqual((relay.run("--delete", "all")[0], len(relay.queue())), (64, 1))
            wait(lambda relay=relay: relay.run("--delete", "all", "--yes")[0] == 0)
            self.assertEqual(relay.queue(), [])
            wait(relay.is_empty, "an empty spool")

    def test_export_is_an_mbox_and_leaves_the_queue(self) -> None:
        for relay in self.both():
            code, text, _ = relay.run("--export", DOMAIN)
            first, second = re.split(r"(?m)^(?=From \S+ \w{3} \w{3} )", text)[1:]
            self.assertTrue(first.startswith("From one@x.example "))
            self.assertTrue(second.startswith("From MAILER-DAEMON "))
            self.assertIn("\n>From here\n>>From there\n", first)
            self.assertIn("X-Envelope-To: <b@%s>\n" % DOMAIN, second)
            self.assertEqual((code, len(relay.files())), (0, 4))
            self.assertEqual(relay.run("--export", "other.example")[0], 1)

    def test_check_finds_what_is_wrong(self) -> None:
        for relay in self.both():
            with shorten(DNS_TRY_S=0.1):
                code, out, _ = relay.run("--check", "--json")
            findings = json.loads(out)
            self.assertEqual((code, {one["level"] for one in findings} <= {"ok", "warning", "error"}), (0, True))
            self.assertTrue(any("primary: 127.0.0.1" in one["text"] for one in findings))

    def test_an_absent_spool_is_an_empty_one(self) -> None:
        relay = Relay(self.folder, "127.0.0.1:9")
        self.assertEqual((relay.queue(), relay.json("--status")["spool"]["messages"], os.path.exists(relay.spool)),
                         ([], 0, False))

    def test_usage_and_configuration_errors_have_their_own_status(self) -> None:
        relay = Relay(self.folder, "127.0.0.1:9")
        for arguments in cases(self, [["--nonsense"], ["--status", "--queue"], ["--json"], ["--flush"], ["x"], ["--flush", "a b"],
                                      ["--stat"]]):
            self.assertEqual(relay.run(*arguments)[0], 64)
        self.assertEqual(run("--config", os.path.join(self.folder, "none.conf"), "--status")[0], 78)
        relay.write_config(domain="zzz = 1")
        code, _, errors = relay.run()
        self.assertEqual((code, bool(re.match(r".*etrn\.conf:\d+: unknown option 'zzz'\n\Z", errors)),
                          os.path.exists(relay.spool)), (78, True, False))

    def test_the_configuration_may_be_named_by_the_environment(self) -> None:
        relay = Relay(self.folder, "127.0.0.1:9")
        with mock.patch.dict(os.environ, {"ETRN_RELAY_CONFIG": relay.file}):
            self.assertIn(DOMAIN, json.loads(run("--status", "--json")[1])["domains"])

    def test_help_is_one_screen_and_names_every_command(self) -> None:
        code, text, _ = run("--help")
        self.assertEqual((code, max(map(len, text.splitlines())) <= 80, len(text.splitlines()) <= 50), (0, True, True))
        for name in cases(self, ["--bounce", "--check", "--delete", "--demo", "--export", "--flush", "--hold", "--print-unit",
                                 "--probe", "--queue",
                                 "--release", "--show", "--status",
                                 "--config", "--json", "--no-wait", "--raw", "--yes", "--version"]):
            self.assertIn(name, text)
        self.assertEqual(run("--version"), (0, "etrn_relay %s\n" % etrn.__version__, ""))

    def test_the_demonstration_works_and_leaves_nothing(self) -> None:
        done = subprocess.run([sys.executable, SOURCE, "--demo"], cwd=self.folder, env=dict(os.environ, TMPDIR=self.folder),
                              stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, check=False)
        self.assertEqual((done.returncode, done.stderr, os.listdir(self.folder)), (0, b"", []))
        self.assertIn(b"Nothing was lost", done.stdout)


# -- the status page

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=y>&amp;\x1b[31m\r\n\u202egpj.exe\x00%s{0}"


def snapshot(**changes: Any) -> etrn.Snapshot:
    """One primary down, one up, one rejecting; with `text` wherever foreign text can stand."""
    text, wall = changes.pop("text", "connect to 192.0.2.1:25: Connection refused"), 1764104472.0
    history = etrn.History()
    for minute in range(0, 8 * 1440, 7):
        at = wall - 8 * 86400 + 60 * minute
        history.note("example.com", minute % 90, "down" if minute % 900 < 90 else "up", at)
    for name, state, depth in (("example.com", "down", 1841), ("example.org", "up", 0), (text, "rejecting", 2)):
        history.note(name, depth, state, wall)
    history.tell("primary", text, "warning", wall - 5)
    history.tell(text, text, text, wall - 5)
    one = {"since": wall - 3600, "bytes": 4120, "oldest": wall - 3600, "accepted": 12, "delivered": 10, "bounced": 0,
           "deferred": 4, "expired": 0, "held": False, "next_probe": wall + 4, "last_error": text}
    status = {"version": "0.1", "pid": 71, "uptime": 7200.0, "connections": 3,
              "spool": {"messages": 1843, "bytes": 8240, "free": 1 << 35, "held": 0, "corrupt": 0, "sick": None,
                        "loading": False},
              "domains": {"example.com": dict(one, primary="down", queued=1841), text: dict(one, primary="rejecting", queued=2),
                          "example.org": dict(one, primary="up", queued=0, bytes=0, oldest=None, last_error="", next_probe=None),
                          "notice:" + text: dict(one, primary="down", queued=1)}}
    status["spool"].update(changes.pop("spool", {}))
    seen = etrn.Histogram(etrn.QUEUE_BOUNDS)
    for value in (0.0, 1.0, 1.5, 1e9, -3.0):
        seen.observe(value)
    return etrn.Snapshot(etrn.Now(1e9, wall), "backup.example.net", status, wall - 7200, 100 << 20, "",
                         (wall - 86400, wall + 9e6),
                         {name: history.copy(name) for name in status["domains"]}, history.latest(), seen.values(),
                         seen.values())._replace(**changes)


class Html(html.parser.HTMLParser):
    """A page taken apart: balanced tags, attributes, texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.stack: List[str] = []
        self.tags: Dict[str, int] = collections.Counter()
        self.attributes: Dict[str, int] = collections.Counter()
        self.texts: List[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags[tag] += 1
        self.attributes.update(name for name, _ in attrs)
        if tag not in ("meta", "path", "rect"):
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags[tag] += 1
        self.attributes.update(name for name, _ in attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag != "rect":
            assert self.stack and self.stack.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


SAMPLE_LINE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\[\\"n])*",?)+)\})? (\S+)')


def parse_metrics(text: str) -> Dict[str, Tuple[str, Dict[Tuple[str, str], float]]]:
    """Prometheus text format 0.0.4, strictly: {family: (type, {(sample, labels): value})}."""
    families: Dict[str, Tuple[str, Dict[Tuple[str, str], float]]] = {}
    helped, name = "", ""
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            helped, _, what = line[7:].partition(" ")
            assert what and helped not in families, line
        elif line.startswith("# TYPE "):
            name, kind = line[7:].split(" ")
            assert name == helped and kind in ("gauge", "counter", "histogram"), line
            assert (kind == "counter") == name.endswith("_total"), line
            families[name] = (kind, {})
        else:
            match = SAMPLE_LINE.fullmatch(line)
            assert match, line
            sample, labels, value = match.group(1), match.group(2) or "", match.group(3)
            kind, samples = families[name]
            suffixes = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
            assert any(sample == name + suffix for suffix in suffixes) and (sample, labels) not in samples, line
            samples[(sample, labels)] = float(value)
    return families


class Page(unittest.TestCase):
    """What is made of values: no socket, no clock."""

    def test_every_foreign_text_is_escaped(self) -> None:
        shown = snapshot(text=HOSTILE, hostname=HOSTILE, unreadable=HOSTILE, spool={"sick": HOSTILE})
        page = etrn.format_page(shown, shown.now.wall)
        parts = Html(page)
        self.assertEqual(parts.stack, [])
        self.assertEqual(set(parts.tags) - {
            "html", "head", "meta", "title", "style", "body", "main", "header", "h1", "h2", "p", "dl", "div", "dt", "dd", "small",
            "section", "span", "i", "b", "figure", "figcaption", "svg", "path", "rect", "ol", "li", "footer", "a"}, set())
        self.assertEqual([name for name in parts.attributes if name == "style" or name.startswith("on")], [])
        self.assertGreater(sum("<script>alert('x')</script>\"><img" in text for text in parts.texts), 5)
        self.assertEqual([c for c in page if not c.isprintable() and c != "\n"], [])

    def test_the_page_says_what_a_postmaster_must_know(self) -> None:
        page = " ".join(" ".join(Html(etrn.format_page(snapshot(), 1764104472.0)).texts).split())
        for text in cases(self, ["The primary of example.com is down; 1,841 messages wait.", "1,843", "Connection refused",
                                 "in 4s", "24 hours", "7 days", "peak 1,841", "32.0G", "Recent events", "refuses below 100M",
                                 "1 notice"]):
            self.assertIn(text, page)
        self.assertNotIn("All is well", page)
        good = snapshot()
        for one in good.status["domains"].values():
            one.update(primary="up", queued=0)
        good.status["spool"]["messages"] = 0
        self.assertIn("All is well", etrn.format_page(good, 1764104472.0))

    def test_what_is_urgent_stands_first(self) -> None:
        for changes, text in cases(self, [
                ({"certificate": (0.0, 1764104472.0 + 86400)}, "certificate ends in 1d"),
                ({"certificate": (0.0, 1764104472.0 - 86400)}, "certificate ended 1d ago"),
                ({"spool": {"corrupt": 2}}, "corrupt/"),
                ({"spool": {"loading": True}}, "still being read"), ({"spool": {"sick": "EIO"}}, "Spool sick: EIO")]):
            self.assertIn(text, etrn.format_page(snapshot(**changes), 1764104472.0).partition("<dl")[0])
        self.assertIn("Loop stalled", etrn.format_page(snapshot(), 1764104472.0, 9.0).partition("<dl")[0])

    def test_hundreds_of_domains_make_a_bounded_page_with_those_in_trouble(self) -> None:
        many = snapshot()
        quiet = many.status["domains"]["example.org"]
        many.status["domains"].update({"d%04d.example" % number: quiet for number in range(3000)})
        page = etrn.format_page(many, 1764104472.0)
        self.assertLess(len(page), 1000000)
        self.assertIn("<h2>example.com</h2>", page)
        self.assertIn("And 2,903 domains", page)

    def test_metrics_are_prometheus_text(self) -> None:
        families = parse_metrics(etrn.format_metrics(snapshot(text=HOSTILE)))
        self.assertTrue(all(name.startswith("etrn_relay_") for name in families))
        self.assertEqual(families["etrn_relay_queue_messages"][1][("etrn_relay_queue_messages", 'domain="example.com"')], 1841)
        self.assertFalse(any("notice:" in labels for _, samples in families.values() for _, labels in samples))
        shown = snapshot(text="x.example").status
        self.assertEqual(sorted(etrn.public_status(shown)["domains"]), ["example.com", "example.org", "x.example"])
        self.assertIn("\nnotices to x.example ", etrn.format_status(shown, 1764104472.0))
        self.assertEqual(sum(value for (_, labels), value in families["etrn_relay_primary_state"][1].items()), 3)
        for name in cases(self, ["etrn_relay_acceptance_seconds", "etrn_relay_queue_time_seconds"]):
            kind, samples = families[name]
            buckets = [value for (sample, _), value in samples.items() if sample.endswith("_bucket")]
            self.assertEqual((kind, buckets[0], buckets[1], buckets[-1]), ("histogram", 3, 4, 5))
            self.assertEqual((buckets, samples[(name + "_count", "")]), (sorted(buckets), 5))
            self.assertIn((name + "_bucket", 'le="+Inf"'), samples)

    def test_a_metrics_parser_that_takes_anything_proves_nothing(self) -> None:
        for bad in cases(self, ["x 1\n", "# HELP a b\n# TYPE a gauge\na{b=\"\\x\"} 1\n", "# HELP a b\n# TYPE a counter\na 1\n",
                                "# HELP a b\n# TYPE a gauge\na 1\na 2\n", "# HELP a b\n# TYPE a gauge\na one\n"]):
            with self.assertRaises((AssertionError, KeyError, ValueError)):
                parse_metrics(bad)

    def test_health_names_its_reasons(self) -> None:
        for changes, reasons in cases(self, [
                ({}, []), ({"spool": {"sick": "Input/output error"}}, ["spool sick: Input/output error"]),
                ({"spool": {"free": 1000}}, ["disk short: 1000B free"]), ({"unreadable": "EACCES"}, ["spool unreadable: EACCES"]),
                ({"spool": {"sick": "x", "free": 0}}, ["spool sick", "disk short"])]):
            found = etrn.find_ills(snapshot(**changes))
            self.assertEqual([ill[:len(reason)] for ill, reason in zip(found, reasons)], reasons)
            self.assertEqual(len(found), len(reasons))

    def test_public_status_has_the_promised_keys_and_no_other(self) -> None:
        public = etrn.public_status(snapshot().status)
        self.assertEqual(set(public), {"version", "pid", "uptime", "connections", "spool", "domains"})
        self.assertEqual(set(public["spool"]), {"messages", "bytes", "free", "held", "corrupt"})
        self.assertEqual(set(public["domains"]["example.com"]), {
            "primary", "since", "queued", "bytes", "oldest", "accepted", "delivered", "bounced", "deferred", "expired",
            "last_error", "next_probe"})


class Histories(unittest.TestCase):
    NOW = 1764104472.0

    def test_a_history_stays_bounded_and_survives_a_save(self) -> None:
        chance = random.Random(822)
        history = etrn.History()
        names = ["d%d.example" % number for number in range(etrn.HISTORY_SITES_MAX + 20)]
        for step in range(6000):            # three weeks
            for name in names[:2] if step else names:
                history.note(name, chance.randrange(2000), chance.choice(["up", "down"]), self.NOW + 300 * step)
            for service in ("primary", "master", "smtp"):
                history.tell(service, "event %d %s" % (step, "x" * 1000), "warning", self.NOW + 300 * step)
        end = self.NOW + 300 * 6000
        values = json.loads(json.dumps(history.to_values(names, end)))
        self.assertEqual(len(history.traces), etrn.HISTORY_SITES_MAX)
        self.assertLessEqual(len(values["sites"][names[0]]["depth"]), 168 + 288 + 3)
        self.assertLessEqual(len(values["sites"][names[0]]["states"]), etrn.HISTORY_STATES_MAX)
        self.assertEqual(len(values["events"]), 3 * etrn.EVENTS_MAX)
        self.assertLess(len(json.dumps(values)), 150000)
        again = etrn.History()
        again.from_values(values, end)
        self.assertEqual(again.to_values(names, end), history.to_values(names, end))
        self.assertEqual(len(again.to_values([], end + 2 * etrn.WEEK_S)["sites"]), 0)

    def test_a_quiet_relay_has_nothing_to_write(self) -> None:
        history = etrn.History()
        history.note(DOMAIN, 0, "up", self.NOW)
        history.to_values([DOMAIN], self.NOW)
        for minute in range(3000):
            history.note(DOMAIN, 0, "up", self.NOW + 60 * minute)
            history.tell("flush", "etrn: site=ourdom.example, messages=0", "info", self.NOW + 60 * minute)
            history.tell("smtp", "a line of each message", "info", self.NOW + 60 * minute)
        self.assertFalse(history.is_dirty)
        event, = history.latest()
        self.assertEqual((event.service, event.times), ("flush", 3000))
        history.note(DOMAIN, 1, "up", self.NOW + 200000)
        self.assertTrue(history.is_dirty)

    def test_nonsense_in_the_file_is_forgotten(self) -> None:
        good = {"depth": [[self.NOW - 9, 3, 2]], "states": [[self.NOW - 9, "up"]]}
        for sites in cases(self, [
                None, [], {"a": None}, {"a": {}}, {"a": {"depth": 1, "states": []}}, {"a": dict(good, depth=[[1, 2]])},
                {"a": dict(good, depth=[["x", 1, 1]])}, {"a": dict(good, depth=[[float("nan"), 1, 1]])},
                {"a": dict(good, depth=[[1, float("inf"), 1]])}, {"a": dict(good, depth=[[self.NOW + 9e9, 1, 1]])},
                {"a": dict(good, states=[[5, "up"], [4, "down"]])}, {"a": dict(good, states=[[10 ** 400, "up"]])}]):
            history = etrn.History()
            history.from_values({"sites": dict(sites, b=good) if isinstance(sites, dict) else sites,
                                 "events": [1, [], ["x"] * 5, [self.NOW + 5, "a", "info", "future", 1], None]}, self.NOW)
            self.assertEqual(sorted(history.traces), ["b"] if isinstance(sites, dict) else [])
            self.assertEqual(history.latest(), ())
        history = etrn.History()
        history.from_values({"events": [[1, HOSTILE, HOSTILE, HOSTILE, 1]],
                             "sites": {HOSTILE: dict(good, states=[[5, HOSTILE]])}}, self.NOW)
        state = snapshot(events=history.latest())
        state.traces["example.com"].states[:] = history.traces[HOSTILE].states
        self.assertEqual(Html(etrn.format_page(state, self.NOW)).tags["script"], 0)

    def test_columns_show_peaks_and_the_worst_state(self) -> None:
        history = etrn.History()
        start = self.NOW - self.NOW % 300
        for at, depth, state in ((0, 5, "up"), (301, 90, "up"), (310, 0, "up"), (1205, 0, "down"), (1210, 1, "up"),
                                 (2000, 1, "off")):
            history.note(DOMAIN, depth, state, start + at)
        trace = history.copy(DOMAIN)
        self.assertEqual(etrn.resample(trace.depth, start - 300, 300, 8), [None, 5, 90, 0, 0, 1, 1, 1])
        self.assertEqual(etrn.resample(trace.depth, start + 600, 300, 2), [0, 0])
        self.assertEqual(etrn.resample_states(trace.states, start - 300, 300, 10),
                         ["", "up", "up", "up", "up", "down", "up", "up", "off", "off"])
        self.assertEqual(etrn.seconds_in(trace.states, start, start + 2100), {"up": 1995.0, "down": 5.0, "off": 100.0})
        self.assertEqual([etrn.format_share(share) for share in (1, 0.99999, 0.5, 0.00001, 0)],
                         ["100%", "99.9%", "50.0%", "0.1%", "0%"])
        line, area = etrn.draw_line([None, 0, 10, 10, None, 5], 10)
        self.assertEqual(line, "M1 62H2V4H4M5 33H6")
        self.assertEqual((area.count("Z"), area.count("M")), (2, 2))

    def test_a_clock_set_back_does_not_break_the_lines(self) -> None:
        history = etrn.History()
        for at, depth in ((9000, 1), (10000, 2), (20000, 3), (9100, 4), (9500, 5)):
            history.note(DOMAIN, depth, "up", at)
        trace = history.traces[DOMAIN]
        self.assertEqual([one[0] for one in trace.depth], sorted(one[0] for one in trace.depth))
        self.assertEqual(trace.depth[-1], (9300, 5, 5))


def fetch(port: int, path: str = "/", method: str = "GET", **headers: str) -> Tuple[int, Any, str]:
    """Status, header fields and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    with contextlib.closing(connection):
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode("utf-8")


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(("%s:%s" % (user, password)).encode()).decode()


class PageOverHttp(unittest.TestCase):
    """The page's server with a loop of our making."""

    def setUp(self) -> None:
        self.asked = 0
        self.said: List[Any] = []
        self.answer: Callable[[etrn.Window], None] = lambda window: window.show(
            self.shown._replace(now=etrn.Now(time.monotonic(), time.time())))
        self.shown = snapshot()
        self.serve()

    def serve(self, token: str = "") -> None:
        self.window = etrn.Window(self.post)
        self.server = etrn.PageServer(etrn.bind_page(etrn.Endpoint("127.0.0.1", 0)), self.window, token, self.said.append)
        self.port = self.server.socket.getsockname()[1]
        self.server.start()
        self.addCleanup(self.server.end)

    def post(self, window: etrn.Window) -> None:
        self.asked += 1
        self.answer(window)

    def raw(self, data: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self.port), DEADLINE_S) as sock:
            sock.sendall(data)
            return b"".join(iter(lambda: sock.recv(65536), b""))

    def test_the_policy_allows_this_very_style_and_nothing_else(self) -> None:
        status, fields, body = fetch(self.port)
        style = body.partition("<style>")[2].partition("</style>")[0]
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        policy = dict(part.strip().partition(" ")[::2] for part in fields["Content-Security-Policy"].split(";"))
        self.assertEqual(policy, {"default-src": "'none'", "style-src": "'sha256-%s'" % digest, "base-uri": "'none'",
                                  "form-action": "'none'", "frame-ancestors": "'none'"})
        self.assertEqual((status, fields["Cache-Control"], fields["X-Content-Type-Options"]), (200, "no-store", "nosniff"))
        self.assertEqual(fields["Content-Type"], "text/html; charset=utf-8")

    def test_paths_and_methods(self) -> None:
        for path, kind in cases(self, [("/", "text/html"), ("/metrics", "text/plain; version=0.0.4"),
                                       ("/status.json?x=y", "application/json"), ("/healthz", "text/plain")]):
            status, fields, body = fetch(self.port, path)
            self.assertEqual((status, fields["Content-Type"]), (200, kind + "; charset=utf-8"))
            head = fetch(self.port, path, "HEAD")
            self.assertEqual((head[0], head[2]), (200, ""))
            self.assertEqual(int(fields["Content-Length"]), len(body.encode()))
        for method in cases(self, ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "FLUSH"]):
            status, fields, _ = fetch(self.port, "/", method)
            self.assertEqual((status, fields["Allow"]), (405, "GET, HEAD"))
        for path in cases(self, ["/x", "/metrics/", "/..%2fmetrics", "/favicon.ico", "/status"]):
            self.assertEqual(fetch(self.port, path)[0], 404)
        self.assertEqual(self.said, [])

    def test_malformed_and_endless_requests(self) -> None:
        for data, expected in cases(self, [
                (b"GET / HTTP/9.9\r\n\r\n", b"505"), (b"GET / X\r\n\r\n", b"400"), (b"\x16\x03\x01\r\n\r\n", b"400"),
                (b"GET / HTTP/1.1\r\nA: " + b"x" * 70000, b"431"), (b"A: b\r\n" * 10000, b"431"),
                (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 500 + b"\r\n", b"431"), (b"GET /metrics HTTP/1.1\n\n", b"200"),
                (b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", b"405")]):
            with contextlib.suppress(ConnectionResetError):     # what we send on after the answer
                self.assertIn(expected, self.raw(data).partition(b"\r\n")[0] or expected)
        self.assertNotIn(b"<script>", self.raw(b"GET <script> HTTP/1.1 <script>\r\n\r\n"))
        self.assertEqual(fetch(self.port, "/healthz")[0], 200)
        self.assertEqual(self.said, [])

    def test_the_token_guards_all_but_healthz(self) -> None:
        self.serve("s3cret:x")
        for given, status in cases(self, [
                ("Bearer s3cret:x", 200), ("bearer  s3cret:x", 200), (basic("anybody", "s3cret:x"), 200),
                (basic("", "s3cret:x"), 200),
                ("", 401), ("Bearer", 401), ("Bearer s3cret", 401), ("Bearer s3cret:xx", 401), ("Bearer S3CRET:X", 401),
                (basic("s3cret:x", ""), 401), ("Basic s3cret:x", 401), ("Basic !!!", 401), ("Digest s3cret:x", 401),
                ("s3cret:x", 401), (basic("a", "b\xff"), 401)]):
            for path in ("/", "/metrics", "/status.json", "/none"):
                got, fields, body = fetch(self.port, path, **({"Authorization": given} if given else {}))
                self.assertEqual(got, status if path != "/none" or status == 401 else 404)
                self.assertEqual(fields["WWW-Authenticate"], None if got != 401 else 'Basic realm="etrn_relay", charset="UTF-8"')
                self.assertFalse(got == 401 and "example.com" in body)
        self.assertEqual(fetch(self.port, "/healthz")[0], 200)
        self.assertEqual(fetch(self.port, "/", "POST")[0], 405)
        self.assertTrue(all("401 wrong token" in line and "s3cret" not in line for line in self.said))
        self.assertEqual(len(self.said), 4 * 10)

    def test_health_is_503_with_the_reason(self) -> None:
        self.assertEqual(fetch(self.port, "/healthz")[::2], (200, "ok\n"))
        self.shown = snapshot(spool={"sick": "Input/output error", "free": 5})
        with shorten(PAGE_FRESH_S=0.0):
            status, _, body = fetch(self.port, "/healthz")
        self.assertEqual(status, 503)
        self.assertRegex(body, r"\Aspool sick: Input/output error.*\ndisk short: 5B free.*\n\Z")

    def test_a_stalled_loop_is_said_and_costs_no_threads(self) -> None:
        fetch(self.port)
        self.answer = lambda window: None
        with shorten(PAGE_FRESH_S=0.0, PAGE_STALL_S=0.05):
            for path in cases(self, ["/healthz", "/metrics", "/status.json"]):
                status, _, body = fetch(self.port, path)
                self.assertEqual((status, body[:12]), (503, "loop stalled"))
            self.assertIn("Loop stalled", fetch(self.port)[2])
            self.assertEqual(self.asked, 2)     # a loop with a question open is not asked again
            self.window.show(self.shown)
            self.answer = lambda window: window.show(self.shown)
            self.assertEqual(fetch(self.port, "/healthz")[0], 200)

    def test_however_many_look_the_loop_is_asked_once_and_the_page_made_once(self) -> None:
        with shorten(PAGE_FRESH_S=DEADLINE_S), mock.patch.object(etrn, "format_page", wraps=etrn.format_page) as made:
            self.assertEqual(len({fetch(self.port)[2] for _ in range(20)}), 1)
        self.assertEqual((self.asked, made.call_count), (1, 1))

    def test_slow_and_many_clients_are_cut_off(self) -> None:
        def is_ended(sock: socket.socket) -> bool:
            with contextlib.suppress(ConnectionResetError):
                return sock.recv(10) == b""
            return True

        def begin() -> socket.socket:
            sock = socket.create_connection(("127.0.0.1", self.port), DEADLINE_S)
            self.addCleanup(sock.close)
            sock.sendall(b"GET / HTT")
            return sock
        most = etrn.PAGE_CONNECTIONS_PER_CLIENT
        many = [begin() for _ in range(most + 4)]
        self.assertTrue(all(is_ended(sock) for sock in many[most:]))
        self.assertEqual(select.select(many[:most], [], [], 0)[0], [])
        for sock in many:
            sock.close()
        with shorten(PAGE_TOTAL_S=0.1, PAGE_FRESH_S=0.05):
            wait(lambda: not self.server.open)
            self.assertTrue(all(is_ended(sock) for sock in [begin() for _ in range(most)]))
        self.assertEqual(self.said, [])

    def test_a_bug_is_told_and_the_page_goes_on(self) -> None:
        with mock.patch.object(etrn, "format_metrics", side_effect=KeyError("x")), self.assertRaises(http.client.HTTPException):
            fetch(self.port, "/metrics")
        self.assertEqual([type(one) for one in self.said], [KeyError])
        self.assertEqual(fetch(self.port, "/metrics")[0], 200)


class PageOfARelay(Relays):
    def page(self, relay: Relay, since: int = 0) -> int:
        return int(relay.logged(r"status page on http://127\.0\.0\.1:(\d+)/", since).group(1))

    def test_the_page_shows_an_outage_and_remembers_it(self) -> None:
        primary = self.primary()
        relay = self.relay(primary, bounces="[status]\nlisten = 127.0.0.1:0", PAGE_FRESH_S=0.0)
        relay.send()
        relay.logged(": down: ")
        port = self.page(relay)
        self.assertIn("The primary of %s is down; 1 message waits." % DOMAIN, fetch(port)[2])
        shown, told = json.loads(fetch(port, "/status.json")[2]), relay.json("--status")
        for one in (shown, told):
            self.assertGreater(one.pop("uptime"), 0)
            self.assertGreater(one["spool"].pop("free"), 0)
            del one["domains"][DOMAIN]["next_probe"]
        self.assertEqual(shown, told)
        primary.start()
        wait(relay.is_empty, "an empty spool")

        def count(name: str, labels: str = "") -> Any:
            families = parse_metrics(fetch(port, "/metrics")[2])
            return families[re.sub("_count$", "", name)][1][(name, labels)]
        wait(lambda: count("etrn_relay_queue_time_seconds_count") == 1, "the delivery to be counted")
        self.assertEqual(count("etrn_relay_acceptance_seconds_count"), 1)
        self.assertEqual(count("etrn_relay_messages_delivered_total", 'domain="%s"' % DOMAIN), 1)
        self.assertEqual(relay.end(), 0)
        with open(os.path.join(relay.spool, "history.json"), encoding="ascii") as file:
            kept = json.load(file)
        self.assertEqual([state for _, state in kept["sites"][DOMAIN]["states"]], ["unknown", "down", "up", "off"])
        self.assertEqual(max(peak for _, peak, _ in kept["sites"][DOMAIN]["depth"]), 1)
        mark = len(relay.log)
        relay.start()
        page = fetch(self.page(relay, mark))[2]
        self.assertIn("peak 1 ", page)
        self.assertIn("%s: down: connect to " % DOMAIN, page)       # an event of before the restart

    def test_a_message_to_two_domains_counts_once(self) -> None:
        primary = self.primary()
        relay = self.relay(primary, domain="[domain other.example]\nprimary = %s" % primary.address)
        self.assertEqual(relay.send(recipients=["a@" + DOMAIN, "b@other.example"])[:3], "250")
        status = relay.json("--status")
        size = status["domains"][DOMAIN]["bytes"]
        self.assertEqual((len(relay.queue()), status["spool"]["messages"], status["spool"]["bytes"]), (2, 1, size))
        relay.run("--hold", "all")
        self.assertEqual(relay.json("--status")["spool"]["held"], 1)
        relay.run("--release", "other.example")
        primary.start()
        wait(lambda: len(relay.queue()) == 1, "one of the two to leave")
        self.assertEqual({name: relay.json("--status")["spool"][name] for name in ("messages", "bytes", "held")},
                         {"messages": 1, "bytes": size, "held": 1})
        relay.run("--release", "all")
        wait(relay.is_empty, "an empty spool")
        wait(lambda: relay.json("--status")["spool"]["messages"] == 0)

    def test_a_hangup_moves_the_page_and_changes_the_token(self) -> None:
        relay = self.relay(bounces="[status]\nlisten = 127.0.0.1:0\ntoken = one")
        port = self.page(relay)
        self.assertEqual(fetch(port, Authorization="Bearer one")[0], 200)
        relay.write_config(bounces="[status]\nlisten = 127.0.0.1:0\ntoken = two")
        relay.signal(signal.SIGHUP)
        relay.logged("configuration reread")
        self.assertEqual([fetch(port, Authorization="Bearer " + token)[0] for token in ("one", "two")], [401, 200])
        relay.logged("http.*: refused: GET / from unknown.127.0.0.1.: 401 wrong token")
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen(1)
            relay.write_config(bounces="[status]\nlisten = 127.0.0.1:%d" % taken.getsockname()[1])
            relay.signal(signal.SIGHUP)
            relay.logged("status page: cannot listen on .*: Address already in use; the old one stays")
        self.assertEqual(fetch(port, Authorization="Bearer two")[0], 200)
        mark = len(relay.log)
        relay.write_config(bounces="[status]\nlisten = localhost:0")
        relay.signal(signal.SIGHUP)
        moved = self.page(relay, mark)
        self.assertEqual((fetch(moved)[0], moved != port), (200, True))
        with self.assertRaises(OSError):
            fetch(port)
        relay.write_config(bounces="")
        mark = len(relay.log)
        relay.signal(signal.SIGHUP)
        relay.logged("configuration reread", mark)
        with self.assertRaises(OSError):
            fetch(moved)
        self.assertEqual(relay.send()[:3], "250")

    def test_a_taken_port_stops_the_start(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen(1)
            port = taken.getsockname()[1]
            relay = Relay(self.folder, "127.0.0.1:9", bounces="[status]\nlisten = 127.0.0.1:%d" % port)
            code, _, errors = relay.run()
        self.assertEqual((code, errors), (75, "etrn_relay.py: cannot listen on 127.0.0.1:%d: Address already in use\n" % port))

    def test_listen_needs_a_port(self) -> None:
        for text, where in cases(self, [("8025", ("0.0.0.0", 8025)), ("[::1]:8025", ("::1", 8025)),
                                        ("localhost:0", ("localhost", 0)),
                                        ("", None), ("127.0.0.1", ""), ("[::1]", ""), ("127.0.0.1:99999", ""), ("a b:1", "")]):
            text = "[status]\nlisten = %s\n" % text
            if where == "":
                with self.assertRaises(etrn.ConfigError):
                    etrn.parse_config(text, "/x/c")
            else:
                self.assertEqual(etrn.parse_config(text, "/x/c").status_listen, where)

    def test_without_http_server_the_rest_works(self) -> None:
        code = ("import sys; sys.modules['http.server'] = None; sys.path.insert(0, %r); import etrn_relay as e\n"
                "cfg = e.parse_config('[relay]\\nhostname = b.example\\nspool = s\\n[status]\\nlisten = 127.0.0.1:0\\n', 'c')\n"
                "spool = e.Spool(cfg.spool); spool.open()\n"
                "server = e.Server(cfg, spool, e.Log('stderr', 'info', 'b')); server.open_page(); server._close()\n"
                "print(e.http, server.page)" % HERE)
        done = subprocess.run([sys.executable, "-c", code], cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              check=False)
        self.assertEqual(done.stdout, b"None None\n", done.stderr)
        self.assertIn(b"no http.server module: there is no status page", done.stderr)

    @unittest.skipUnless(shutil.which("openssl"), "openssl is not installed")
    def test_certificate_dates_are_read(self) -> None:
        for days in cases(self, ["30", "20000"]):       # from 2050 on dates have another type
            command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout k -out c -subj /CN=b"
            subprocess.run([*command.split(), "-days", days], cwd=self.folder, check=True, stderr=subprocess.DEVNULL)
            shown = subprocess.run(["openssl", "x509", "-in", "c", "-noout", "-dates"], cwd=self.folder, check=True,
                                   stdout=subprocess.PIPE).stdout.decode()
            certificate = etrn.Certificate(os.path.join(self.folder, "c"), os.path.join(self.folder, "k"))
            self.assertEqual(certificate.dates, tuple(float(ssl.cert_time_to_seconds(line.partition("=")[2]))
                                                      for line in shown.split("\n")[:2]))
        with open(os.path.join(self.folder, "c"), encoding="ascii") as file:
            der = ssl.PEM_cert_to_DER_cert(file.read())
        for length in range(len(der)):
            self.assertRaises(ValueError, etrn.parse_certificate, der[:length])


class Terminal(unittest.TestCase):
    def setUp(self) -> None:
        self.now = 1764104472.0
        waiting = [("example.com", "queued"), ("example.com", "held"), ("a-very-long-name-of-a-domain.example.org", "delivering")]
        self.rows = [{"id": "6611F58B85C7%d" % number, "domain": domain, "state": state, "size": 4120,
                      "sender": "somebody.with.a.long.name@sender.example",
                      "received": self.now - 7300 * number, "expires": self.now + 86400,
                      "next_attempt": None if state == "held" else self.now + 95,
                      "recipients": [{"address": "user%d@%s" % (n, domain), "attempts": 3,
                                      "last_response": "450 4.2.0 " + HOSTILE * 3} for n in range(number + 1)]}
                     for number, (domain, state) in enumerate(waiting)]
        self.sidecar = etrn.make_sidecar(
            "6611F58B85C7A", "mail", "a@b.example", [("u@example.com", "example.com", "", "", self.now + 9e5)], self.now - 5000,
            {"address": "192.0.2.7", "helo": HOSTILE, "tls": None}, "", False)
        self.sidecar.update(size=4120, sha256="0" * 64)
        self.sidecar["recipients"][0].update(last_attempt=self.now - 60, last_response=HOSTILE * 5, next_attempt=self.now + 240)

    def texts(self, style: etrn.Style) -> List[str]:
        status = snapshot(text=HOSTILE * 3).status
        return [etrn.format_queue(self.rows, self.now, style), etrn.format_status(status, self.now, style),
                etrn.format_envelope(self.sidecar, b"Subject: x", self.now, style)]

    def test_lines_fit_the_terminal(self) -> None:
        for width in cases(self, [60, 80, 100, 132, 200]):
            for text in self.texts(etrn.Style(width, True)):
                plain = re.sub("\033\\[[0-9]+m", "", text)
                self.assertLessEqual(max(map(len, plain.split("\n"))), width, plain)
                self.assertIn("\033[1m", text)

    def test_elsewhere_nothing_is_cut_and_nothing_coloured(self) -> None:
        for text in self.texts(etrn.PLAIN):
            self.assertTrue(all(c.isprintable() or c == "\n" for c in text))
        queue = etrn.format_queue(self.rows, self.now)
        self.assertIn("<somebody.with.a.long.name@sender.example>", queue)
        for pattern in cases(self, [r"(?m)^example\.com +2  8\.0K +1  +2h1m  in 1m35s$", r"(?m)^all +3 ", r"user0@\S+, user1",
                                    r"(?m)^6611F58B85C71 +2h1m  4\.0K  held +- ", r"(?m)^example.com: 450 4\.2\.0 "]):
            self.assertRegex(queue, pattern)
        self.assertRegex(etrn.format_envelope(self.sidecar, b"", self.now), r"next try in 4m, expires in 10d10h")

    def test_colours_are_for_terminals_and_may_be_refused(self) -> None:
        for is_terminal, environment, expected in cases(self, [
                (False, {}, (0, False)), (True, {"COLUMNS": "97"}, (97, True)),
                (True, {"COLUMNS": "97", "NO_COLOR": "1"}, (97, False)),
                (True, {"COLUMNS": "97", "NO_COLOR": ""}, (97, True)), (True, {"COLUMNS": "97", "TERM": "dumb"}, (97, False))]):
            with mock.patch.dict(os.environ, {"TERM": "xterm", "NO_COLOR": "", **environment}), mock.patch.object(
                    sys, "stdout", mock.Mock(isatty=lambda is_terminal=is_terminal: is_terminal)):
                self.assertEqual(etrn.find_style(), expected)


# -- service managers

class Manager:
    """The socket a service manager listens on, sd_notify(3)."""

    def __init__(self, address: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(address)
        self.sock.settimeout(DEADLINE_S)

    def heard(self) -> List[str]:
        return self.sock.recv(4096).decode("utf-8").split("\n")

    def heard_of(self, word: str) -> List[str]:
        """The next datagram that says so; those before it are skipped."""
        while True:
            lines = self.heard()
            if word in lines:
                return lines


class Supervision(Relays):
    """Readiness, watchdog and passed sockets."""

    def supervised(self, environ: Dict[str, str], listeners: Sequence[socket.socket] = (), **options: Any) -> Relay:
        """A relay that a service manager started: LISTEN_PID is its own, descriptors begin at 3."""
        code = "import os\n" + "".join("os.dup2(%d, %d)\n" % (100 + number, 3 + number) for number in range(len(listeners)))
        if listeners:
            code += "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='%d')\n" % len(listeners)
        for number, sock in enumerate(listeners):
            os.dup2(sock.fileno(), 100 + number)
            self.addCleanup(os.close, 100 + number)
        with mock.patch.dict(os.environ, environ), mock.patch.dict(globals(), STARTER=code + STARTER):
            popen = subprocess.Popen
            passed = tuple(range(100, 100 + len(listeners)))
            with mock.patch.object(subprocess, "Popen", lambda *words, **rest: popen(*words, pass_fds=passed, **rest)):
                return self.relay(**options)

    def test_a_service_manager_hears_of_readiness_reload_watchdog_and_the_stop(self) -> None:
        abstract = ["\0etrn-test-%d" % os.getpid()] if sys.platform == "linux" else []
        for address in cases(self, [os.path.join(self.folder, "notify"), *abstract]):
            manager = Manager(address)
            self.addCleanup(manager.sock.close)
            relay = self.supervised({"NOTIFY_SOCKET": address.replace("\0", "@"), "WATCHDOG_USEC": "300000"})
            ready = manager.heard()
            self.assertEqual(ready, ["READY=1", "STATUS=0 messages waiting, 0 connections"])
            began = time.monotonic()
            for _ in range(3):
                self.assertEqual(manager.heard_of("WATCHDOG=1")[1][:7], "STATUS=")
            self.assertLess(time.monotonic() - began, 5)
            relay.signal(signal.SIGHUP)
            self.assertRegex(manager.heard_of("RELOADING=1")[1], r"^MONOTONIC_USEC=\d+$")
            manager.heard_of("READY=1")
            self.assertEqual(relay.end(), 0)
            manager.heard_of("STOPPING=1")

    def test_the_watchdog_is_not_fed_when_the_loop_hangs(self) -> None:
        now = [100.0]
        supervisor = etrn.Supervisor({"NOTIFY_SOCKET": os.path.join(self.folder, "n"), "WATCHDOG_USEC": "30000000"})
        manager = Manager(os.path.join(self.folder, "n"))
        self.addCleanup(manager.sock.close)
        spool = etrn.Spool(os.path.join(self.folder, "spool"))
        spool.open()
        self.addCleanup(spool.close)
        server = etrn.Server(config("listen = 127.0.0.1:0\nmin_free_space = 0"), spool, etrn.Log("stderr", "error", "x"))
        self.addCleanup(server._close)
        server.supervisor = supervisor
        assert supervisor.sock is not None
        self.addCleanup(supervisor.sock.close)
        with mock.patch.object(etrn.time, "monotonic", lambda: now[0]):
            server._turn(0)
            self.assertEqual(manager.heard()[0], "WATCHDOG=1")
            self.assertEqual(supervisor.next_ping, 115)         # half the interval
            self.assertLessEqual(server._pause(), 15)
            now[0] = 114.0
            server._turn(0)
            manager.sock.setblocking(False)
            self.assertRaises(BlockingIOError, manager.heard)
            now[0] = 200.0
            self.assertRaises(BlockingIOError, manager.heard)   # no turn, no word
            server._turn(0)
            self.assertEqual(manager.heard()[0], "WATCHDOG=1")

    def test_what_a_service_manager_says_is_for_us_alone(self) -> None:
        ours = str(os.getpid())
        for environ, interval, count in cases(self, [
                ({}, 0, 0), ({"WATCHDOG_USEC": "2000000"}, 0, 0),               # nobody to tell
                ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "2000000"}, 1, 0),
                ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "2000000", "WATCHDOG_PID": ours}, 1, 0),
                ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "1"}, 0, 0),
                ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "x"}, 0, 0), ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "0"}, 0, 0),
                ({"LISTEN_FDS": "2", "LISTEN_PID": ours}, 0, 2), ({"LISTEN_FDS": "2", "LISTEN_PID": "1"}, 0, 0),
                ({"LISTEN_FDS": "2"}, 0, 0), ({"LISTEN_FDS": "-1", "LISTEN_PID": ours}, 0, 0)]):
            given = dict(environ, HOME="/")
            supervisor = etrn.Supervisor(given)
            self.assertEqual((supervisor.interval, supervisor.count, given), (interval, count, {"HOME": "/"}))
            self.assertEqual(supervisor.next_ping, 0 if interval else etrn.INF)
            supervisor.tell("READY=1")                          # nobody listens: no matter
            if supervisor.sock is not None:
                supervisor.sock.close()

    def listener(self, host: str = "127.0.0.1") -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.addCleanup(sock.close)
        sock.bind((host, 0))
        sock.listen(8)
        return sock

    def test_passed_sockets_that_match_no_address_all_serve_smtp_and_sighup_keeps_them(self) -> None:
        first, second = self.listener(), self.listener()
        relay = self.supervised({"LISTEN_FDNAMES": "one:two"}, [first, second])
        ports = [first.getsockname()[1], second.getsockname()[1]]
        self.assertEqual(relay.port, ports[0])
        relay.signal(signal.SIGHUP)
        relay.logged("configuration reread")
        for port in cases(self, ports):
            with Wire(port) as wire:
                self.assertIn("220 backup.example.net", wire.greeting)

    def test_passed_sockets_serve_as_the_addresses_they_have(self) -> None:
        mine, stray = self.listener(), self.listener()
        where, other = (etrn.Endpoint(*sock.getsockname()) for sock in (mine, stray))
        spool = etrn.Spool(os.path.join(self.folder, "spool"))
        spool.open()
        self.addCleanup(spool.close)
        log = etrn.Log("stderr", "error", "x")
        server = etrn.Server(config("listen = %s, 127.0.0.1:0" % str(where)), spool, log)
        self.addCleanup(server._close)
        with mock.patch.object(log, "write") as written:
            server.adopt([mine.dup(), stray.dup()])
        self.assertIn("%s, which is not in listen: closed" % str(other), written.call_args[0][1])
        server.listen()
        self.assertEqual((len(server.listeners), where in server.manager.listeners, other in server.manager.listeners),
                         (2, True, False))
        server.cfg = config("listen = 127.0.0.1:0")
        server.listen()                 # SIGHUP
        self.assertIn(where, server.manager.listeners)

    def test_a_passed_socket_for_both_families_stands_for_both_addresses(self) -> None:
        sock = socket.socket(socket.AF_INET6)
        self.addCleanup(sock.close)
        try:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.bind(("::", 0))
        except OSError:
            self.skipTest("no IPv6 here")
        sock.listen(8)
        port = sock.getsockname()[1]
        spool = etrn.Spool(os.path.join(self.folder, "spool"))
        spool.open()
        self.addCleanup(spool.close)
        server = etrn.Server(config("listen = %d" % port), spool, etrn.Log("stderr", "error", "x"))
        self.addCleanup(server._close)
        server.adopt([sock.dup()])
        server.listen()
        self.assertEqual(server.manager.listeners, (etrn.Endpoint("::", port),))

    def test_a_passed_socket_that_cannot_serve_stops_the_start(self) -> None:
        relay = Relay(self.folder, "127.0.0.1:9")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, socket.socket() as other:
            other.bind(("127.0.0.1", 0))                        # bound, but it does not listen
            for wrong in cases(self, [sock, other]):
                code = ("import os; os.dup2(%d, 3); os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1')\n"
                        % wrong.fileno())
                done = subprocess.run([sys.executable, "-c", code + STARTER, "{}", "--config", relay.file], check=False,
                                      pass_fds=[wrong.fileno()], stderr=subprocess.PIPE)
                self.assertEqual(done.returncode, 78)
                self.assertIn(b"descriptor 3 of the service manager: ", done.stderr)


class Units(Folder):
    """--print-unit"""

    def unit(self, kind: str, text: str = "", name: str = "etrn.conf", written: bool = True) -> str:
        path = os.path.join(self.folder, name)
        if written:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        code, out, errors = run("--print-unit", kind, "--config", path)
        self.assertEqual((code, errors), (0, ""))
        return out

    def test_every_kind_names_this_script_this_python_and_the_configuration(self) -> None:
        for kind in cases(self, sorted(etrn.UNITS)):
            for written in (True, False):
                out = self.unit(kind, written=written)
                for path in (sys.executable, SOURCE, os.path.join(self.folder, "etrn.conf")):
                    self.assertIn(path, out)
        self.assertEqual(run("--print-unit", "sysv")[0], 64)
        self.unit("systemd", "[relay]\n")
        with open(os.path.join(self.folder, "etrn.conf"), "a", encoding="utf-8") as file:
            file.write("nonsense = 1\n")
        self.assertEqual(run("--print-unit", "systemd", "--config", os.path.join(self.folder, "etrn.conf"))[0], 78)

    def test_without_a_configuration_it_is_the_one_in_etc(self) -> None:
        with mock.patch.object(os.path, "exists", return_value=False), mock.patch.dict(os.environ, ETRN_RELAY_CONFIG=""):
            self.assertIn("--config /etc/etrn.conf\n", run("--print-unit", "systemd")[1])

    def test_a_systemd_unit_gives_what_the_configuration_needs_and_no_more(self) -> None:
        for text, lines, absent in cases(self, [
                ("[relay]\nlisten = 25\nspool = /var/lib/etrn_relay/q\n",
                 ["DynamicUser=yes", "StateDirectory=etrn_relay/q", "CapabilityBoundingSet=CAP_NET_BIND_SERVICE",
                  "AmbientCapabilities=CAP_NET_BIND_SERVICE"], ["ReadWritePaths", "\nUser="]),
                ("[relay]\nlisten = 2525\nuser = mail\nspool = /srv/mail spool\nlog = /srv/log/relay.log\n",
                 ["User=mail", "CapabilityBoundingSet=", "AmbientCapabilities=", 'ReadWritePaths="/srv/mail spool" /srv/log'],
                 ["DynamicUser", "StateDirectory"])]):
            out = self.unit("systemd", text)
            for line in lines + ["Type=notify", "ProtectSystem=strict", "NoNewPrivileges=yes", "MemoryDenyWriteExecute=yes",
                                 "Restart=on-failure", 'ExecReload=/bin/sh -c "kill -HUP ${MAINPID}"',
                                 "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6", "SystemCallFilter=@system-service"]:
                self.assertIn(line, out.split("\n"))
            self.assertRegex(out, r"\nWatchdogSec=\d+\n(?:.*\n)*LimitNOFILE=\d+\n")
            for word in absent:
                self.assertNotIn(word, out)

    def test_words_that_systemd_would_take_apart_are_quoted(self) -> None:
        for text, quoted in cases(self, [
                ("/usr/bin/python3", "/usr/bin/python3"), ("/a b", '"/a b"'), ("/50%", "/50%%"), ("/$HOME", "/$$HOME"),
                ('/"x"', '"/\\"x\\""'), ("/it's", '"/it\'s"'), ("/a\\b", '"/a\\\\b"'), ("/a;b", '"/a;b"'), ("", '""')]):
            self.assertEqual(etrn.quote_systemd(text, True), quoted)
        self.assertEqual(etrn.quote_systemd("/$x"), "/$x")

    NASTY = "it's a \"50%\" $HOME & <b>;.conf"

    def test_systemd_itself_finds_nothing_wrong(self) -> None:
        if not shutil.which("systemd-analyze"):
            self.skipTest("systemd-analyze is not installed")
        path = os.path.join(self.folder, "etrn_relay.service")
        for text in cases(self, ["[relay]\nspool = /var/lib/etrn_relay\n", "[relay]\nuser = mail\nspool = a b\n"]):
            with open(path, "w", encoding="utf-8") as file:
                file.write(self.unit("systemd", text, self.NASTY))
            done = subprocess.run(["systemd-analyze", "verify", "--man=no", path], stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, check=False)
            about_us = [line for line in done.stdout.decode().split("\n") if "etrn_relay" in line]
            self.assertEqual((about_us, done.returncode), ([], 0))

    def shell(self, script: str, prelude: str) -> List[str]:
        """The words that a script of shell functions hands on, one a line."""
        done = subprocess.run(["sh", "-c", prelude + script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        return done.stdout.decode("utf-8").rstrip("\n").split("\n")

    def test_openrc_and_procd_scripts_hand_on_each_word_whole(self) -> None:
        path = os.path.join(self.folder, self.NASTY)
        command = [sys.executable, SOURCE, "--config", path]
        openrc = self.unit("openrc", "[relay]\nuser = mail\n", self.NASTY)
        self.assertEqual(self.shell(openrc + 'eval printf "\'%s\\n\'" $command -- $command_args\n', "")[:5],
                         [command[0], "--", *command[1:]])
        self.assertEqual(self.shell(openrc + "start_pre\n", 'checkpath() { printf "%s\\n" "$@"; }\n'),
                         ["-d", "-m", "0700", "-o", "mail", os.path.join(self.folder, "spool")])
        procd = self.unit("procd", "", self.NASTY)
        words = self.shell(procd + "start_service\n", "procd_open_instance() { :; }; procd_close_instance() { :; }\n"
                           'procd_set_param() { [ "$1" != command ] || { shift; printf "%s\\n" "$@"; }; }\n')
        self.assertEqual(words, command)

    def test_launchd_reads_its_plist(self) -> None:
        for name in cases(self, ["etrn.conf", self.NASTY, "a--b.conf"]):
            for written in (True, False):
                if os.path.exists(os.path.join(self.folder, name)):
                    os.unlink(os.path.join(self.folder, name))
                read = plistlib.loads(self.unit("launchd", name=name, written=written).encode("utf-8"))
                self.assertEqual(read["ProgramArguments"], [sys.executable, SOURCE, "--config", os.path.join(self.folder, name)])
                self.assertEqual(read["KeepAlive"], {"SuccessfulExit": False})


# -- certificates

def der(tag: int, *parts: bytes) -> bytes:
    data = b"".join(parts)
    size = bytes([len(data)]) if len(data) < 128 else b"\x82" + struct.pack("!H", len(data))
    return bytes([tag]) + size + data


def distinguished(**parts: str) -> bytes:
    return der(0x30, *(der(0x31, der(0x30, der(0x06, b"\x55\x04" + {"CN": b"\3", "O": b"\x0a", "OU": b"\x0b"}[name]),
                                     der(0x0c, text.encode("utf-8")))) for name, text in parts.items()))


def certificate(since: bytes = der(0x17, b"250101000000Z"), until: bytes = der(0x18, b"20500101000000Z"),
                names: Sequence[bytes] = (der(0x82, b"MX.b.example"), der(0x82, b"*.c.example"), der(0x87, b"\xc0\0\2\7")),
                version: bytes = der(0xa0, der(2, b"\2"))) -> bytes:
    extensions = der(0xa3, der(0x30, der(0x30, der(6, b"\x55\x1d\x13"), der(1, b"\xff"), der(4, der(0x30))),
                               der(0x30, der(6, b"\x55\x1d\x11"), der(4, der(0x30, *names))))) if names else b""
    return der(0x30, der(0x30, version, der(2, b"\1"), der(0x30), distinguished(O="Acme", CN="CA"), der(0x30, since, until),
                         distinguished(OU="x", CN="Common.example"), der(0x30), extensions), der(0x30), der(3, b"\0"))


class Certificates(unittest.TestCase):
    def test_names_and_dates_are_read(self) -> None:
        facts = etrn.parse_certificate(certificate())
        self.assertEqual(facts, etrn.X509("CN=Common.example", "O=Acme, CN=CA", ("mx.b.example", "*.c.example", "192.0.2.7"),
                                          1735689600.0, 2524608000.0))
        self.assertEqual(etrn.parse_certificate(certificate(names=())).names, ("common.example",))
        self.assertEqual(etrn.parse_certificate(certificate(version=b"")).until, 2524608000.0)
        self.assertEqual(etrn.parse_certificate(certificate(since=der(0x17, b"500101000000Z"))).since, -631152000.0)

    def test_names_are_compared_by_whole_labels(self) -> None:
        facts = etrn.parse_certificate(certificate())
        for host, is_so in cases(self, [("mx.b.example", True), ("MX.B.example", True), ("b.example", False),
                                        ("a.c.example", True), ("a.a.c.example", False), ("c.example", False),
                                        ("xmx.b.example", False)]):
            self.assertIs(facts.is_for(host), is_so)

    def test_garbage_is_refused_and_nothing_else_happens(self) -> None:
        whole = certificate()
        for cut in range(len(whole)):
            self.assertRaises(ValueError, etrn.parse_certificate, whole[:cut])
        chance = random.Random(4)
        for _ in range(3000):
            data = bytearray(whole)
            for _ in range(chance.randint(1, 4)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            with contextlib.suppress(ValueError):
                self.assertIsInstance(etrn.parse_certificate(bytes(data)), etrn.X509)
        for data in cases(self, [b"", b"\x30\x80\0\0", b"\x30\x84\xff\xff\xff\xff", b"\x1f\x81\0", b"\x30\x89" + b"\1" * 20]):
            self.assertRaises(ValueError, etrn.parse_certificate, data)
        self.assertRaises(ValueError, etrn.parse_pem, b"-----BEGIN CERTIFICATE-----\n@@\n-----END CERTIFICATE-----")
        self.assertRaises(ValueError, etrn.parse_pem, b"")


def make_certificate(test: unittest.TestCase, folder: str, name: str = "backup.example.net", days: int = 30) -> Tuple[str, str]:
    """A real one, self-signed: its file and its key's."""
    if not shutil.which("openssl"):
        test.skipTest("openssl is not installed")
    files = os.path.join(folder, name + ".pem"), os.path.join(folder, name + ".key")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days",
                    str(days), "-subj", "/CN=" + name, "-addext", "subjectAltName=DNS:" + name, "-out", files[0],
                    "-keyout", files[1]], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return files


class Watchfulness(Folder):
    """Alerts of what nears its end: the disk, the certificate."""

    def test_a_certificate_that_nobody_renews_is_told_once_a_day(self) -> None:
        log, told = mock.Mock(), []     # type: ignore[var-annotated]
        cfg = config("[alerts]\nmail = a@b.example\n[tls]\ncertificate = c.pem\nkey = k.pem")
        alerts = etrn.Alerts(cfg, log, told.append)
        end = 2e9
        for days, count, text in cases(self, [(15, 0, ""), (13.99, 1, "expires in 13d23h"), (13.5, 1, ""), (12.9, 2, "12d21h"),
                                              (-1, 3, "has expired")]):
            alerts.sweep([], 10 ** 12, etrn.Now(0.0, end - days * 86400), end)
            self.assertEqual(len(told), count)
            self.assertIn(text, told[-1]["text"] if told else "")
        self.assertEqual({one["event"] for one in told}, {"certificate"})
        self.assertIn("c.pem", log.write.call_args[0][1])

    def test_a_disk_that_fills_is_noticed_though_no_mail_comes(self) -> None:
        spool = etrn.Spool(os.path.join(self.folder, "spool"))
        spool.open()
        self.addCleanup(spool.close)
        log = mock.Mock()
        now = etrn.Now(100.0, 1e9)
        manager = etrn.Manager(config("[alerts]\nmail = a@b.example"), spool, log, lambda report: None, now)
        self.addCleanup(manager.committers.stop)
        with mock.patch.object(manager.alerts, "mail") as mail, mock.patch.object(spool, "free", return_value=10 ** 12) as free:
            for second, octets, count in cases(self, [(1, 10 ** 12, 0), (2, 150 << 20, 1), (3, 140 << 20, 1), (4, 10 ** 12, 1),
                                                      (86500, 130 << 20, 2)]):
                free.return_value = octets
                manager.tick(etrn.Now(100.0 + 2 * second, 1e9 + 2 * second))
                self.assertEqual(mail.call_count, count)
            self.assertEqual(mail.call_args[0][0]["event"], "disk")

    def test_a_long_outage_without_alerts_does_not_keep_the_loop_awake(self) -> None:
        spool = etrn.Spool(os.path.join(self.folder, "spool"))
        spool.open()
        self.addCleanup(spool.close)
        manager = etrn.Manager(config(), spool, mock.Mock(), lambda report: None, etrn.Now(100.0, 1e9))
        self.addCleanup(manager.committers.stop)
        manager.alerts.on_state(manager.scheduler.site(DOMAIN, manager.now), "down", "down: x", manager.now)
        for second in cases(self, range(0, 700, 3)):
            now = etrn.Now(100.2 + second, 1e9 + second)
            manager.tick(now)
            self.assertGreater(manager.wake(now), now.mono)
            self.assertLessEqual(manager.wake(now), now.mono + etrn.STATE_SAVE_S)

    def test_the_relay_reads_the_date_of_its_own_certificate_and_of_the_next(self) -> None:
        files = make_certificate(self, self.folder, days=3)
        spool = etrn.Spool(os.path.join(self.folder, "spool"))
        spool.open()
        self.addCleanup(spool.close)
        cfg = config("[tls]\ncertificate = %s\nkey = %s" % files)
        server = etrn.Server(cfg, spool, etrn.Log("stderr", "error", "x"))
        self.addCleanup(server._close)
        server.set_certificate(server.load_certificate())
        self.assertAlmostEqual(server.manager.certificate_end, time.time() + 3 * 86400, delta=60)
        make_certificate(self, self.folder, days=90)
        server.now = etrn.Now(server.now.mono + 60, server.now.wall + 60)
        server._sweep()                 # no client asks for STARTTLS
        self.assertAlmostEqual(server.manager.certificate_end, time.time() + 90 * 86400, delta=60)


# -- --probe and --check

class TlsPrimary(Primary):
    """A primary that takes STARTTLS."""

    def __init__(self, files: Tuple[str, str], **script: Any) -> None:
        super().__init__(**script)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(*files)
        self.script["greeting"] = b""

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), sock, sock.makefile("rb") as clear:
            sock.sendall(b"220 primary.example ESMTP\r\n")
            for line in clear:
                if line.upper().startswith(b"STARTTLS"):
                    sock.sendall(b"220 2.0.0 go on\r\n")
                    with self.context.wrap_socket(sock, server_side=True) as inner, inner.makefile("rb") as lines:
                        return self._talk(inner, lines)
                sock.sendall(b"250-primary.example\r\n250 STARTTLS\r\n" if line.upper().startswith(b"EHLO") else b"250 ok\r\n")


def ask(relay: Relay, dns: Dns) -> Relay:
    """Have it ask that nameserver."""
    with open(relay.file, encoding="utf-8") as file:
        text = file.read().replace("nameservers = 127.0.0.1:9", "nameservers = %s" % str(dns.endpoint))
    with open(relay.file, "w", encoding="utf-8") as file:
        file.write(text)
    return relay


class Probes(Relays):
    def probe(self, primary: str, domain: str = "", relay: str = "", zone: Any = None) -> Tuple[int, Dict[str, Any], str]:
        """Exit status, what --json says, and what people read."""
        one = Relay(self.folder, primary, relay=relay, domain=domain)
        if zone is not None:
            dns = Dns(zone).__enter__()
            self.addCleanup(dns.__exit__)
            ask(one, dns)
        code, out, _ = one.run("--probe", DOMAIN, "--json")
        again, text, _ = one.run("--probe", DOMAIN)
        self.assertEqual(again, code)
        self.assertFalse(os.path.exists(one.spool))
        return code, json.loads(out), text

    def test_a_primary_that_takes_mail_is_shown_and_nothing_is_sent(self) -> None:
        primary = self.primary().start()
        code, found, text = self.probe(primary.address)
        host = found["hosts"][0]
        self.assertEqual((code, found["served"], host["takes_mail"], host["error"], host["size"], host["tls"]),
                         (0, True, True, None, 1000000, None))
        self.assertEqual((host["greeting"], host["mail"], host["rcpt"]),
                         ("220 primary.example ESMTP", "250 2.1.0 ok", "250 2.1.5 ok"))
        self.assertEqual(sorted(host["extensions"]), ["8BITMIME", "DSN", "PIPELINING", "SIZE", "SMTPUTF8"])
        self.assertGreaterEqual(host["connect_seconds"], 0)
        self.assertEqual(primary.log[:6], ["ehlo backup.example.net", "MAIL FROM:<>", "RCPT TO:<postmaster@%s>" % DOMAIN,
                                           "RSET", "QUIT", "ehlo backup.example.net"])
        self.assertEqual(primary.messages, [])
        for word in ("primary.example ESMTP", "PIPELINING", "TLS: not offered", "it would take mail"):
            self.assertIn(word, text)

    def test_the_exit_status_tells_refused_from_unreachable_and_from_foreign(self) -> None:
        primary = self.primary(RCPT="550 5.1.1 no postmaster").start()
        self.assertEqual(self.probe(primary.address)[0], 75)
        primary.script = {"greeting": "554 5.3.2 go away"}
        code, found, text = self.probe(primary.address)
        self.assertEqual((code, found["hosts"][0]["greeting"]), (69, "554 5.3.2 go away"))
        self.assertIn("refused to talk to us", text)
        primary.stop()
        code, found, text = self.probe(primary.address)
        host = found["hosts"][0]
        self.assertEqual((code, "Connection refused" in host["error"], host["greeting"]), (69, True, None))
        relay = Relay(self.folder, "127.0.0.1:9")
        code, out, errors = relay.run("--probe", "other.example", "--json")
        self.assertEqual((code, json.loads(out), "no such domain here" in errors),
                         (1, {"domain": "other.example", "served": False}, True))
        self.assertEqual(relay.run("--probe", "a b")[0], 64)

    def test_a_probe_ends_although_the_primary_does_not_answer(self) -> None:
        for stage in cases(self, ["greeting", "EHLO", "RCPT"]):
            primary = self.primary(**{stage: HANG}).start()
            with shorten(PROBE_REPLY_S=0.5):
                began = time.monotonic()
                code, found, _ = self.probe(primary.address)
            self.assertLess(time.monotonic() - began, 10)
            self.assertEqual((code, "timed out" in found["hosts"][0]["error"]), (75 if stage == "RCPT" else 69, True))

    def test_the_certificate_is_shown_whether_or_not_it_verifies(self) -> None:
        files = make_certificate(self, self.folder, "primary.example")
        primary = TlsPrimary(files)
        self.addCleanup(primary.__exit__)
        primary.start()
        pin = hashlib.sha256(ssl.PEM_cert_to_DER_cert(open(files[0], encoding="ascii").read())).hexdigest()     # noqa: SIM115
        for policy, code in cases(self, [("may", 0), ("require", 0), ("none", 0), ("verify", 69), ("sha256:" + pin, 0),
                                         ("sha256:" + "0" * 64, 69)]):
            got, found, text = self.probe(primary.address, "tls = %s\n" % policy)
            tls = found["hosts"][0]["tls"]
            self.assertEqual((got, tls["verified"], tls["subject"], tls["names"], tls["sha256"]),
                             (code, False, "CN=primary.example", ["primary.example"], pin))
            self.assertRegex(tls["protocol"], "TLSv1.[23]")
            self.assertIn("not verified: TLS with 127.0.0.1 failed", text)
            self.assertAlmostEqual(tls["not_after"], time.time() + 30 * 86400, delta=120)
            self.assertIn("STARTTLS", found["hosts"][0]["extensions"])
            self.assertIn("8BITMIME" if policy != "none" else "STARTTLS", found["hosts"][0]["extensions"])
        with mock.patch.dict(os.environ, SSL_CERT_FILE=files[0]):       # now the chain does, and the name does not
            self.assertIn("127.0.0.1", self.probe(primary.address)[1]["hosts"][0]["tls"]["error"])

    def test_a_certificate_that_verifies_costs_one_connection(self) -> None:
        files = make_certificate(self, self.folder, "mx.primary.example")
        primary = TlsPrimary(files)
        self.addCleanup(primary.__exit__)
        primary.start()
        zone = {("mx.primary.example", etrn.A): ["127.0.0.1"]}
        with mock.patch.dict(os.environ, SSL_CERT_FILE=files[0]):
            code, found, text = self.probe("mx.primary.example:%d" % primary.port, "tls = verify", zone=zone)
        self.assertEqual((code, found["hosts"][0]["tls"]["verified"], found["hosts"][0]["tls"]["error"]), (0, True, None))
        self.assertIn("verified for mx.primary.example", text)
        self.assertEqual(primary.log.count("QUIT"), 2)          # for people and for machines
        self.assertEqual([line for line in primary.log if line.startswith("MAIL")], ["MAIL FROM:<>"] * 2)

    def test_a_probe_ends_although_the_dns_does_not_answer(self) -> None:
        with Dns({}, mangle=lambda packet: None) as dns, shorten(PROBE_ROUTE_S=0.2):
            relay = ask(Relay(self.folder, "mx"), dns)
            began = time.monotonic()
            code, out, _ = relay.run("--probe", DOMAIN, "--json")
            self.assertLess(time.monotonic() - began, 10)
        self.assertEqual((code, json.loads(out)["hosts"], "DNS: no answer" in json.loads(out)["error"]), (69, [], True))

    def test_a_dead_dns_leaves_the_route_that_worked_last(self) -> None:
        primary = self.primary().start()
        relay = Relay(self.folder, "mx")
        os.mkdir(relay.spool)
        with open(os.path.join(relay.spool, "state.json"), "w", encoding="utf-8") as file:
            json.dump({"sites": {DOMAIN: {"route": [["mail.example", "127.0.0.1", primary.port]], "route_of": "mx"}}}, file)
        code, out, _ = relay.run("--probe", DOMAIN, "--json")
        self.assertEqual((code, "using the route that worked last" in json.loads(out)["warning"]), (0, True))

    def test_the_route_is_explained(self) -> None:
        mx = {(DOMAIN, etrn.MX): [(10, "a.example"), (20, "backup.example.net"), (20, "peer.example"), (5, "gone.example")],
              ("a.example", etrn.A): ["127.0.0.2"], ("backup.example.net", etrn.A): ["127.0.0.3"],
              ("peer.example", etrn.A): ["127.0.0.4"]}
        with mock.patch.object(etrn, "SMTP_PORT", self.primary().port):
            code, found, text = self.probe("mx", zone=mx)
        why = {one["host"]: one["why_not"] for one in found["records"]}
        self.assertEqual((code, [one["preference"] for one in found["records"]], [host["address"] for host in found["hosts"]]),
                         (69, [5, 10, 20, 20], ["127.0.0.2"]))
        self.assertEqual((why["a.example"], why["backup.example.net"], why["peer.example"]),
                         (None, "this host itself", "no better than this host"))
        self.assertIn("no such name", why["gone.example"])
        self.assertIn("127.0.0.2", text)
        code, found, _ = self.probe("mx", zone={(DOMAIN, etrn.MX): [(0, "")]})
        self.assertEqual((code, found["hosts"], "null MX" in found["error"], "null MX" in found["records"][0]["why_not"]),
                         (69, [], True, True))
        code, found, _ = self.probe("mx", zone={})
        self.assertEqual((code, "no such name" in found["error"]), (69, True))


class Checks(Relays):
    def check(self, relay: str = "", domain: str = "", bounces: str = "", zone: Any = None,
              primary: str = "127.0.0.1:9") -> Tuple[int, List[Dict[str, str]]]:
        one = Relay(self.folder, primary, relay=relay, domain=domain, bounces=bounces)
        with Dns(zone or {}) as dns:
            ask(one, dns)
            before = sorted(os.listdir(self.folder))
            code, out, _ = one.run("--check", "--json")
            self.assertEqual(sorted(os.listdir(self.folder)), before)       # nothing is changed
        return code, json.loads(out)

    def found(self, level: str, text: str, **options: Any) -> int:
        code, findings = self.check(**options)
        self.assertTrue(any(one["level"] == level and text in one["text"] for one in findings), (level, text, findings))
        self.assertEqual(code, 78 if any(one["level"] == "error" for one in findings) else 0)
        return code

    def test_names_and_addresses_of_this_host(self) -> None:
        name = "backup.example.net"
        self.found("ok", "backup.example.net: 127.0.0.1", zone={(name, etrn.A): ["127.0.0.1"]})
        self.found("warning", "no such name: " + name)
        zone = {(name, etrn.A): ["1.1.1.1", "1.0.0.1", "8.8.8.8"], ("1.1.1.1.in-addr.arpa", etrn.PTR): [name],
                ("1.0.0.1.in-addr.arpa", etrn.PTR): ["one.example"]}
        code, findings = self.check(zone=zone)
        texts = {one["text"]: one["level"] for one in findings}
        self.assertEqual(texts["1.1.1.1 is called " + name], "ok")
        self.assertEqual(texts["1.0.0.1 is called one.example"], "warning")
        self.assertEqual(texts["8.8.8.8 has no name: many servers refuse notices from there"], "warning")
        self.assertTrue(any("behind a NAT" in text for text in texts))
        self.assertEqual(code, 0)
        local = etrn.parse_config("[relay]\nhostname = localhost", "/nowhere/x.conf")
        self.assertEqual(etrn.check_hostname(local, etrn.Resolver(()))[0].level, "warning")

    def test_the_mx_records_should_name_this_host_and_a_better_one(self) -> None:
        for records, level, text in cases(self, [
                ([(10, "mx.example"), (20, "backup.example.net")], "ok", "MX: 10 mx.example, 20 backup.example.net"),
                ([(10, "mx.example")], "warning", "do not name backup.example.net"),
                ([(10, "backup.example.net"), (10, "mx.example")], "warning", "no better host"),
                ([(10, "backup.example.net"), (20, "mx.example")], "warning", "no better host")]):
            self.found(level, text, zone={(DOMAIN, etrn.MX): records})

    def test_the_primary_is_reached_and_its_size_noted(self) -> None:
        primary = self.primary().start()
        code, findings = self.check(primary=primary.address)
        self.assertTrue(any(re.search("answers in .*up to 976K.*max_message_size = 50M", one["text"]) for one in findings),
                        findings)
        self.assertEqual(primary.log, ["ehlo backup.example.net", "RSET", "QUIT"])
        primary.stop()
        self.assertEqual(self.found("warning", "Connection refused", primary=primary.address), 0)

    def test_what_the_relay_has_to_tell_should_not_wait_with_the_mail(self) -> None:
        self.found("warning", "postmaster = p@%s: this relay serves" % DOMAIN, bounces="postmaster = p@" + DOMAIN)
        self.found("warning", "mail = a@%s: this relay serves" % DOMAIN, bounces="[alerts]\nmail = a@" + DOMAIN)
        self.found("error", "there is no program /no/such", bounces="[alerts]\ncommand = /no/such --thing")
        _, findings = self.check(bounces="postmaster = p@other.example\n[alerts]\nmail = a@other.example\ncommand = sh -c true")
        self.assertFalse([one for one in findings if one["what"] == "config" and one["level"] != "ok"])

    def test_files_it_needs(self) -> None:
        self.found("error", "No such file", domain="recipients = file:users")
        with open(os.path.join(self.folder, "users"), "w", encoding="utf-8") as file:
            file.write("nonsense\n")
        self.found("warning", "not an address in line 1", domain="recipients = file:users")

    def test_the_certificate_has_our_name_and_some_time_left(self) -> None:
        for name, days, level, text in cases(self, [
                ("backup.example.net", 60, "ok", "for backup.example.net, until"),
                ("backup.example.net", 5, "warning", "expires in 4d"),
                ("other.example", 60, "warning", "not for backup.example.net, but for other.example")]):
            files = make_certificate(self, self.folder, name, days)
            self.found(level, text, bounces="[tls]\ncertificate = %s\nkey = %s" % files)
        self.found("error", "none.pem", bounces="[tls]\ncertificate = none.pem\nkey = none.key")
        with mock.patch.object(etrn.time, "time", lambda: etrn.parse_pem(open(files[0], "rb").read()).until + 5):    # noqa: SIM115
            self.found("error", "expired on", bounces="[tls]\ncertificate = %s\nkey = %s" % files)

    def test_the_spool_is_a_directory_and_the_log_has_one(self) -> None:
        spool = os.path.join(self.folder, "spool")
        self.found("error", "none/relay.log", relay="log = none/relay.log")
        self.found("error", "this account cannot write", relay="log = .")
        with open(spool, "wb"):
            pass
        self.found("error", "spool is not a directory")

    def test_the_spool_must_be_of_use_to_its_account(self) -> None:
        spool = os.path.join(self.folder, "spool")
        with mock.patch.object(etrn, "file_system", return_value="vfat"):
            self.found("warning", "vfat: mail there renames are not atomic")
        self.found("error", "no such account", relay="user = nosuchuser")
        if os.geteuid() != 0:
            self.skipTest("only root can become another account")
        os.mkdir(spool, 0o700)
        self.found("error", "nobody cannot write", relay="user = nobody")
        os.chmod(self.folder, 0o711)
        os.chown(spool, pwd.getpwnam("nobody").pw_uid, -1)
        code, findings = self.check(relay="user = nobody")
        self.assertEqual(code, 0, findings)
        secret = os.path.join(self.folder, "secret")        # root reads it, and then is root no more
        with open(os.open(secret, os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="ascii") as file:
            file.write("u@%s\n" % DOMAIN)
        for level, text, options in cases(self, [
                ("error", "nobody cannot read " + secret, {"domain": "username = u\npassword = file:" + secret}),
                ("error", "nobody cannot read " + secret, {"domain": "recipients = file:" + secret}),
                ("error", "nobody cannot read " + secret, {"bounces": "username = u\npassword = file:" + secret}),
                ("error", "nobody cannot write", {"relay": "log = relay.log"}),
                ("error", "nobody cannot write", {"relay": "log = secret"})]):
            options["relay"] = "user = nobody\n" + options.get("relay", "")
            self.found(level, text, **options)

    def test_a_disk_that_is_full_already_is_an_error(self) -> None:
        free = etrn.Spool(self.folder).free()
        for size, level in cases(self, [(free // 3, "ok"), (free * 2 // 3, "warning"), (free * 2, "error")]):
            with mock.patch.dict(globals(), CONFIG=CONFIG.replace("min_free_space = 0", "min_free_space = %d" % size)):
                self.found(level, "/spool: ")

    def test_a_password_of_the_smarthost_that_cannot_be_read_is_an_error(self) -> None:
        self.found("error", "none: No such file", bounces="username = u\npassword = file: none")

    def test_a_port_of_somebody_else_is_an_error(self) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            sock.listen(1)
            with mock.patch.dict(globals(), CONFIG=CONFIG.replace("127.0.0.1:0", "127.0.0.1:%d" % sock.getsockname()[1])):
                self.found("error", "Address already in use")

    def test_it_ends_although_nobody_answers(self) -> None:
        with shorten(CHECK_S=0.3), mock.patch.object(etrn.Resolver, "query", lambda *_: time.sleep(10)):
            began = time.monotonic()
            self.found("warning", "no answer within")
            self.assertLess(time.monotonic() - began, 9)


# -- what other programs read in the log

class LogReaders(Relays):
    def day(self) -> str:
        """A log with an event of every kind; returns its path."""
        def rcpt(argument: str) -> Optional[str]:
            return {"later": "450 4.2.0 Greylisted", "never": "550 5.1.1 (no) such, user"}.get(argument[4:].partition("@")[0])
        primary = self.primary(RCPT=rcpt).start()
        relay = self.relay(primary, domain="recovery_grace = 0s\nrecipients = any", relay="greet_pause = 0")
        relay.send(sender="one@x.example", recipients=["a@" + DOMAIN, "b@" + DOMAIN])
        relay.send(sender="", recipients=["later@" + DOMAIN])
        relay.send(sender="", recipients=["never@" + DOMAIN])
        with relay.client() as wire:
            wire.say("MAIL FROM:<s@x.example>", "RCPT TO:<x@other.example>", "RCPT TO:<x%%y@%s>" % DOMAIN, "RSET",
                     "MAIL FROM:<s@x.example> SIZE=999999999", "ETRN " + DOMAIN)
            for _ in range(11):
                wire.say("NONSENSE")
        relay.send(b"Received: x\r\n" * 101 + b"\r\n")
        relay.logged("status=bounced")
        relay.logged("status=deferred .*Greylisted")
        primary.stop()
        relay.send(sender="one@x.example", recipients=["a@" + DOMAIN])
        relay.logged("to=<a@.* status=deferred .*Connection refused")
        self.assertEqual(relay.end(), 0)
        path = os.path.join(self.folder, "mail.log")
        with open(path, "w", encoding="utf-8") as file:
            file.write("\n".join(relay.log) + "\n")
        return path

    def read(self, *command: str) -> str:
        program = shutil.which(command[0], path=os.environ.get("PATH", "") + ":/usr/sbin")
        if program is None:
            self.skipTest("%s is not installed" % command[0])
        path = self.day()
        done = subprocess.run([program, *(path if word == "LOG" else word for word in command[1:])], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, check=False)
        self.assertEqual(done.returncode, 0, done.stdout)
        return done.stdout.decode("utf-8", "replace")

    def test_pflogsumm_counts_what_happened(self) -> None:
        # --syslog-name=etrn_relay would not do: pflogsumm makes hyphens of the underscores in a word that begins with two hyphens
        text = self.read("pflogsumm", "--syslog-name", "etrn_relay", "LOG")
        counts = {name: int(number) for number, name in re.findall(
            r"^ +(\d+) +(received|delivered|deferred|bounced|rejected|recipients)", text, re.MULTILINE)}
        self.assertEqual(counts, {"received": 4, "delivered": 2, "deferred": 2, "bounced": 1, "rejected": 4, "recipients": 2})
        self.assertIn("4.2.0 Greylisted", text)
        self.assertIn("Relay access denied (total: 2)", text)
        self.assertRegex(text, r"5\.1\.1 \(no\) such, user")

    def test_fail2ban_finds_the_address_to_ban(self) -> None:
        text = self.read("fail2ban-regex", "LOG", "postfix[_daemon=etrn_relay/smtpd]", "--print-all-matched", "-v")
        matched = re.findall(r"^\|  .*etrn_relay/smtpd\[\d+\]: (.*)$", text.partition("Matched line(s)")[2], re.MULTILINE)
        self.assertEqual([line.partition(";")[0].partition(" from ")[0] for line in matched],
                         ["NOQUEUE: reject: RCPT", "NOQUEUE: reject: RCPT", "too many errors after READY"])
        self.assertEqual(len(re.findall(r"^\| +127\.0\.0\.1 ", text, re.MULTILINE)), 3)

    def test_delays_are_written_as_postfix_does(self) -> None:
        for seconds, text in cases(self, [(0, "0"), (0.00001, "0"), (0.0123, "0.012"), (1.25, "1.2"), (9.99, "10"), (12.7, "12"),
                                          (5432.1, "5432"), (604800, "604800")]):
            self.assertEqual(etrn.format_delay(seconds), text)

    def test_syslog_gets_the_service_the_process_and_the_priority(self) -> None:
        fake = mock.Mock(LOG_PID=1, LOG_MAIL=16, LOG_ERR=3, LOG_WARNING=4, LOG_INFO=6, LOG_DEBUG=7)
        with mock.patch.object(etrn, "syslog", fake):
            log = etrn.Log("syslog", "debug", "backup.example.net")
            for service, text, level in [("smtpd", "A: client=x[192.0.2.1]", "info"), ("smtpd", "b", "debug"),
                                         ("qmgr", "c", "warning"), ("smtpd", "d", "error")]:
                log.write(service, text, level)
            log.reopen()
            log.write("smtpd", "e")
            log.flush()
        self.assertEqual(fake.syslog.call_args_list, [mock.call(6, "A: client=x[192.0.2.1]"), mock.call(7, "b"),
                                                      mock.call(4, "warning: c"), mock.call(3, "error: d"), mock.call(6, "e")])
        self.assertEqual(fake.openlog.call_args_list, [mock.call("etrn_relay/" + name, 1, 16)
                                                       for name in ("smtpd", "qmgr", "smtpd", "smtpd")])

    def test_a_real_syslog_daemon_gets_lines_that_the_same_programs_read(self) -> None:
        if os.geteuid() != 0 or not shutil.which("unshare"):
            self.skipTest("a /dev of our own needs root and unshare")
        os.mkdir(os.path.join(self.folder, "dev"))
        with open(os.path.join(self.folder, "dev", "null"), "wb"), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.bind(os.path.join(self.folder, "dev", "log"))
            sock.settimeout(DEADLINE_S)
            code = ("import sys; sys.path.insert(0, %r); import etrn_relay as e; log = e.Log('syslog', 'info', 'x'); "
                    "log.write('smtpd', 'NOQUEUE: reject: x'); log.write('primary', 'x: rejecting', 'warning')" % HERE)
            done = subprocess.run(["unshare", "-m", "sh", "-c", "mount --bind /dev/null dev/null && mount --rbind dev /dev && "
                                   'exec "$0" -c "$1"', sys.executable, code], cwd=self.folder, check=False,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            if b"unshare" in done.stdout or b"mount" in done.stdout:
                self.skipTest("no mount namespaces here: %s" % done.stdout.decode().strip())
            self.assertEqual(done.stdout, b"")
            lines = [sock.recv(4096).decode().rstrip("\0") for _ in range(2)]
        self.assertRegex(lines[0], r"^<22>\w{3} [ \d]\d \d\d:\d\d:\d\d etrn_relay/smtpd\[\d+\]: NOQUEUE: reject: x$")
        self.assertRegex(lines[1], r"^<20>.* etrn_relay/primary\[\d+\]: warning: x: rejecting$")

    def test_a_rotated_log_is_opened_anew_at_sighup(self) -> None:
        relay = Relay(self.folder, "127.0.0.1:9", relay="log = relay.log")
        path = os.path.join(self.folder, "relay.log")
        relay.process = subprocess.Popen([sys.executable, "-c", STARTER, "{}", "--config", relay.file])
        relay.reader = threading.Thread()
        relay.reader.start()
        self.addCleanup(relay.__exit__)

        def says(name: str, word: str) -> bool:
            if not os.path.exists(name):
                return False
            with open(name, encoding="utf-8") as file:
                return word in file.read()
        wait(lambda: says(path, "started"))
        os.rename(path, path + ".1")
        relay.signal(signal.SIGHUP)
        wait(lambda: says(path, "configuration reread"))
        self.assertEqual((relay.end(), says(path, "stopped"), says(path + ".1", "configuration reread")), (0, True, False))


class Idle(Folder):
    def test_a_long_outage_that_nobody_is_told_of_lets_the_loop_sleep(self) -> None:
        with Local(self.folder, domain="probe_interval = 1h\n[alerts]\nafter = 0s\n") as relay:
            with contextlib.closing(Wire(relay.port)) as client:
                client.say("EHLO x")
                client.send(MESSAGE)
            manager = relay.server.manager
            wait(lambda: manager.scheduler.sites[DOMAIN].state is etrn.Primary.DOWN, "the outage")
            wait(lambda: not manager.alerts.down, "the pending alert to go")      # till then the loop wakes for it at once


class Misuse(Relays):
    """Odd commands, odd terminals, odd owners."""

    def terminal(self, relay: Relay, *arguments: str, answer: bytes = b"") -> Tuple[int, str]:
        """A command whose input and output are a terminal: exit status and what it showed."""
        master, slave = os.openpty()
        with os.fdopen(master, "rb", buffering=0) as screen:
            process = subprocess.Popen([*COMMAND, "--config", relay.file, *arguments], stdin=slave, stdout=slave,
                                       stderr=slave)
            os.close(slave)
            os.write(master, answer)
            shown = b""
            with contextlib.suppress(OSError):              # Linux: EIO when the other side is closed
                while True:
                    part = screen.read(4096)
                    if not part:
                        break
                    shown += part
            return process.wait(DEADLINE_S), shown.decode()

    def test_no_odd_command_starts_a_relay_or_does_anything(self) -> None:
        relay = Relay(self.folder, "127.0.0.1:9")
        for arguments in cases(self, [["--flush", ""], ["--queue="], ["--hold", ""], ["--show", ""], ["--config", "", "--queue"],
                                      ["--yes"], ["--raw"], ["--no-wait"], ["--queue", "--yes"], ["--flush", "#queue"],
                                      ["--hold", "a b"], ["--delete", "all"], ["--bounce", "ALL"], ["--show"]]):
            with mock.patch.object(etrn, "serve", side_effect=AssertionError("a relay was started")):
                code, out, errors = relay.run(*arguments)
            self.assertEqual((code, out, errors[:14], os.path.exists(relay.spool)), (64, "", "etrn_relay.py:", False))
        for arguments in cases(self, [["--show", "nosuchid"], ["--show", "../../etc"], ["--show", "ABCDEF12"],
                                      ["--flush", "x.example"],
                                      ["--flush", "@x.example"], ["--flush", "b\u00fccher.example"], ["--queue", "abcdef12"],
                                      ["--export", "x.example"], ["--export", "@x.example"], ["--delete", "x.example"]]):
            code, out, errors = relay.run(*arguments)
            self.assertEqual((code, out, errors.count("\n")), (1, "", 1), errors)

    def test_without_any_configuration_it_says_where_one_is_looked_for(self) -> None:
        if os.path.exists("/etc/etrn.conf"):
            self.skipTest("this machine has /etc/etrn.conf")
        environment = {key: value for key, value in os.environ.items() if key != "ETRN_RELAY_CONFIG"}
        done = subprocess.run([*COMMAND, "--queue"], cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              env=environment, check=False)
        self.assertEqual((done.returncode, done.stdout), (78, b""))
        self.assertIn(b"neither ./etrn.conf nor /etc/etrn.conf", done.stderr)

    def test_one_message_is_listed_alone_and_shown_with_the_same_attempts(self) -> None:
        relay = self.relay()
        relay.send()
        relay.send(sender="", recipients=["Other@OURDOM.example"])
        wait(lambda: min(row["recipients"][0]["attempts"] for row in relay.queue()) >= 2, "two attempts each")
        id = relay.queue()[1]["id"]
        self.assertEqual([row["id"] for row in relay.json("--queue", id.lower())], [id])
        one, = relay.json("--show", id)["recipients"]
        self.assertGreaterEqual(one["attempts"], 2)
        self.assertRegex(one["last_response"], r"^connect to 127\.0\.0\.1:\d+: Connection refused$")
        self.assertRegex(relay.run("--show", id)[1], r"<Other@ourdom\.example>: queued, (?:[2-9]|\d\d+) attempts")

    def test_a_hold_of_subdomains_or_of_all_holds_the_first_mail_too(self) -> None:
        for what in cases(self, ["@" + DOMAIN, "all", DOMAIN.upper()]):
            relay = self.relay(self.primary().start())
            self.assertEqual(relay.run("--hold", what)[0], 0)
            relay.send()
            self.assertEqual([row["state"] for row in relay.queue()], ["held"])
            relay.run("--release", what)
            wait(relay.is_empty, "an empty spool")

    def test_flush_tells_of_held_mail(self) -> None:
        relay = self.relay()
        relay.send()
        id = relay.queue()[0]["id"]
        self.assertEqual(relay.run("--hold", id)[1], "%s: 1 message held\n" % id)
        self.assertEqual(relay.run("--flush", DOMAIN), (0, DOMAIN + ": nothing is queued, 1 held message not touched\n", ""))

    def test_flush_draws_its_progress_on_a_terminal(self) -> None:
        primary = self.primary()
        relay = self.relay(primary)
        for _ in range(3):
            relay.send()
        relay.logged(": down: ")
        primary.start()
        code, shown = self.terminal(relay, "--flush", DOMAIN.upper())
        self.assertEqual(code, 0, shown)
        last = shown.replace("\r\n", "\n").split("\r")[-1]
        self.assertRegex(last, r"(?:\[#{40}\] \d of \d\n)?ourdom\.example: (?:3 delivered|\d delivered|nothing is queued)")
        wait(relay.is_empty, "an empty spool")
        primary.stop()
        relay.send()
        relay.end()
        primary.start()
        code, shown = self.terminal(relay, "--flush", "all")        # without a relay
        self.assertEqual((code, shown.replace("\r\n", "\n").split("\r")[-1]),
                         (0, "[%s] 1 of 1\nall: 1 delivered, 0 returned, 0 still waiting\n" % ("#" * 40)))

    def test_delete_all_asks_on_a_terminal(self) -> None:
        relay = self.relay()
        relay.send()
        relay.end()
        for answer, left in cases(self, [(b"\n", 1), (b"\x04", 1), (b"y\n", 0)]):
            code, shown = self.terminal(relay, "--delete", "all", answer=answer)
            self.assertEqual((code, "Really delete all queued mail?" in shown, len(relay.queue())), (0, True, left), shown)

    def test_mail_expires_without_a_daemon_too(self) -> None:
        """--flush from cron: three runs that failed after its time, and the last run's own try."""
        grey = self.primary(RCPT="450 4.2.0 greylisted").start()
        for primary in cases(self, [None, grey]):
            relay = self.relay(primary, domain="lifetime = 1s")
            if primary is not None:
                primary.stop()
            relay.send()
            relay.end()
            one, = relay.queue()
            time.sleep(max(0.0, one["expires"] + 0.01 - time.time()))
            if primary is not None:
                primary.start()
            for run in range(1, 4):
                relay.run("--flush", DOMAIN)
                kinds = [json.load(open(os.path.join(relay.spool, name), encoding="utf-8"))["kind"]      # noqa: SIM115
                         for name in relay.files() if name.endswith(".json")]
                self.assertEqual((run, kinds), (run, ["mail"] if run < 3 else ["notice"]))
            self.assertEqual(relay.run("--show", one["id"])[0], 1)
        relay = self.relay(domain="lifetime = 1s")
        relay.send()
        relay.end()
        one, = relay.queue()
        primary = self.primary()
        path = os.path.join(relay.spool, one["id"] + ".json")
        with open(path, encoding="utf-8") as file:
            sidecar = json.load(file)
        sidecar["recipients"][0]["attempts"] = 9
        with open(path, "w", encoding="utf-8") as file:
            json.dump(sidecar, file)
        time.sleep(max(0.0, one["expires"] + 0.01 - time.time()))
        relay.write_config(primary=primary.start().address)
        relay.run("--flush", DOMAIN)
        self.assertEqual((len(primary.messages), relay.files()), (1, []))       # the primary is back: delivered, however late

    def test_delete_all_takes_an_answer_from_a_script(self) -> None:
        relay = self.relay()
        relay.send()
        relay.end()
        for answer, code, left in cases(self, [(b"", 64, 1), (b"n\n", 0, 1), (b"y\n", 0, 0)]):
            done = subprocess.run([*COMMAND, "--config", relay.file, "--delete", "all"], input=answer, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE)
            self.assertEqual((done.returncode, len(relay.queue())), (code, left), done)

    def test_an_export_names_the_recipients_of_its_domain_alone(self) -> None:
        relay = self.relay(domain="[domain two.example]\n")
        relay.send(recipients=["u@" + DOMAIN, "v@two.example"])
        for what, found in cases(self, [(DOMAIN, ["u@" + DOMAIN]), ("two.example", ["v@two.example"]),
                                        ("all", ["u@" + DOMAIN, "v@two.example"])]):
            self.assertEqual(re.findall("X-Envelope-To: <(.*)>", relay.run("--export", what)[1]), found)

    def test_mailbox_reads_an_export_and_its_bodies_come_back(self) -> None:
        relay = self.relay()
        bodies = [b"", b"one\r\n", b"From here\r\n>From there\r\n\r\n\r\n", b"no end of line",
                  "From\u00e9\r\n".encode(), b".\r\n..\r\n"]
        for body in bodies:
            relay.send(b"Subject: x\r\n\r\n" + body + (b"" if body.endswith(b"\n") or not body else b"\r\n"))
        relay.send(sender="j\u00f6rg@sender.example", parameters=" SMTPUTF8")
        relay.end()
        file = os.path.join(self.folder, "mbox")
        with open(file, "wb") as out:
            subprocess.run([*COMMAND, "--config", relay.file, "--export", "all"], stdout=out, check=True)
        with contextlib.closing(mailbox.mbox(file)) as box:
            mails = [box.get_bytes(key).split(b"\n\n", 1)[1] for key in box.keys()]
            self.assertEqual(box[len(bodies)].get_from().split()[0], "j_rg@sender.example")
        for body, mail in zip(bodies, mails):
            back = re.sub(rb"(?m)^>(>*From )", rb"\1", mail).replace(b"\n", b"\r\n")
            self.assertEqual(back.rstrip(b"\r\n"), body.rstrip(b"\r\n"))
        if os.path.exists("/dev/full"):
            with open("/dev/full", "wb") as full:
                done = subprocess.run([*COMMAND, "--config", relay.file, "--export", "all"], stdout=full,
                                      stderr=subprocess.PIPE, check=False)
            self.assertEqual((done.returncode, done.stderr), (75, b"etrn_relay.py: No space left on device\n"))

    def test_a_reader_that_leaves_is_no_error(self) -> None:
        relay = self.relay()
        relay.send(b"Subject: x\r\n\r\n" + b"y" * 200000 + b"\r\n")
        id = relay.queue()[0]["id"]
        for arguments in cases(self, [["--export", DOMAIN], ["--show", id, "--raw"]]):
            reader, writer = os.pipe()
            os.close(reader)
            done = subprocess.run([*COMMAND, "--config", relay.file, *arguments], stdout=writer, stderr=subprocess.PIPE,
                                  check=False)
            os.close(writer)
            self.assertEqual((done.returncode, done.stderr), (0, b""))

    @unittest.skipUnless(hasattr(os, "geteuid") and os.geteuid() == 0, "needs root, to become another account")
    def test_an_account_owns_all_of_its_spool_whoever_commands(self) -> None:
        os.chmod(self.folder, 0o755)
        relay = Relay(self.folder, self.primary().address, relay="user = nobody")
        with relay:
            relay.send()
            relay.logged(": down: ")
            self.assertEqual(relay.end(), 0)
        self.assertEqual(relay.run("--hold", "all")[0], 0)          # by root, on the spool itself
        owners = {os.stat(os.path.join(folder, name)).st_uid
                  for folder, _, files in os.walk(relay.spool) for name in [".", *files]}
        self.assertEqual((owners, os.geteuid(), os.getegid()), ({pwd.getpwnam("nobody").pw_uid}, 0, 0))
        for user, why in cases(self, [("nosuch", "there is no such account"), ("nobody", "that account cannot write the spool")]):
            os.chown(relay.spool, 0, 0)
            relay.write_config(relay="user = " + user)
            done = subprocess.run([*COMMAND, "--config", relay.file], stderr=subprocess.PIPE, check=False)
            self.assertEqual((done.returncode, why in done.stderr.decode()), (78, True), done.stderr)

    def test_what_the_configuration_names_must_be_there_before_a_port_is_bound(self) -> None:
        for lines in cases(self, [{"relay": "log = missing/relay.log"}, {"bounces": "username = u\npassword = file:missing"},
                                  {"domain": "recipients = file:missing"},
                                  {"domain": "[tls]\ncertificate = missing\nkey = missing"},
                                  {"relay": "spool = etrn.conf"}]):
            relay = Relay(tempfile.mkdtemp(dir=self.folder), "127.0.0.1:9", **lines)
            with mock.patch.object(etrn.Server, "listen", side_effect=AssertionError("a port was bound")):
                code, _, errors = relay.run()
            self.assertEqual((code, errors.count("\n")), (78, 1), errors)


def program(name: str) -> str:
    """The path of a real program; its test is skipped where there is none."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if path is None:
        raise unittest.SkipTest("no %s here" % name)
    return path


class Outage(Relays):
    """The main job, with programs that are not ours."""

    def smtp_sink(self, port: int, folder: str) -> "subprocess.Popen[bytes]":
        """Postfix's smtp-sink, which leaves a file for each message; as root it wants to become somebody."""
        os.chmod(folder, 0o777)
        command = [program("smtp-sink"), "-d", os.path.join(folder, "mail."), "127.0.0.1:%d" % port, "64"]
        if os.geteuid() == 0:
            command[1:1] = ["-u", "nobody"]
            os.chmod(self.folder, 0o755)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def smtp_source(self, relay: Relay, *arguments: str) -> None:
        subprocess.run([program("smtp-source"), *arguments, "-t", "user@" + DOMAIN, "127.0.0.1:%d" % relay.port],
                       check=True, timeout=3 * DEADLINE_S, stdout=subprocess.DEVNULL)

    def test_smtp_source_sends_while_there_is_no_primary_and_smtp_sink_gets_it_all_on_its_return(self) -> None:
        primary = self.primary()            # for a port that nobody has
        relay = self.relay(primary)
        self.smtp_source(relay, "-m", "150", "-s", "10", "-l", "3000", "-N")
        relay.logged(": down: ")
        self.assertEqual(len(relay.files()), 300)
        primary.sock.close()
        folder = tempfile.mkdtemp(dir=self.folder)
        self.smtp_sink(primary.port, folder)
        wait(relay.is_empty, "an empty spool")
        texts = []
        for name in os.listdir(folder):
            with open(os.path.join(folder, name), "rb") as file:
                texts.append(file.read())
        self.assertEqual(len({re.search(rb"X-Rcpt-Args: <([^>]*)>", text).group(1) for text in texts}), 150)      # type: ignore
        self.assertEqual({len(re.findall(rb"(?m)^\tby backup\.example\.net ", text)) for text in texts}, {1})

    def test_mail_of_all_sizes_arrives_octet_for_octet_over_kills_of_the_relay(self) -> None:
        chance = random.Random(20)
        sizes = [int(2 ** chance.uniform(6, 17)) for _ in range(60)] + [40 << 20]
        line = bytes(chance.randrange(32, 256) for _ in range(70)) + b"\r\n"
        bodies = {"s%d@x.example" % number: b"Subject: %d\r\n\r\n" % number + line * (size // len(line)) + b".\r\n..\r\n"
                  for number, size in enumerate(sizes)}
        primary = self.primary()
        primary.extensions[-1] = "SIZE 100000000"
        relay = self.relay(primary)
        taken: List[str] = []

        def send(senders: List[str]) -> None:
            for sender in senders:
                while sender not in taken:
                    with contextlib.suppress(OSError, IndexError):
                        if relay.send(bodies[sender], sender=sender)[:3] == "250":
                            taken.append(sender)
                    time.sleep(0.001)
        threads = [threading.Thread(target=send, args=([*bodies][part::4],)) for part in range(4)]
        for thread in threads:
            thread.start()
        wait(lambda: len(taken) >= 20)
        relay.end(signal.SIGKILL)           # in mid-receive
        relay.start()
        for thread in threads:
            thread.join()
        self.assertEqual(sorted(taken), sorted(bodies))
        primary.start()
        wait(lambda: len(primary.messages) >= 20)
        relay.end(signal.SIGKILL)           # in mid-delivery
        relay.start()
        wait(relay.is_empty, "an empty spool")
        got: Dict[str, set] = collections.defaultdict(set)
        for sender, _, data in primary.messages:
            got[sender].add(hashlib.sha256(without_received(data)).digest())
        self.assertEqual(got, {sender: {hashlib.sha256(body).digest()} for sender, body in bodies.items()})

    def test_fetchmail_asks_for_each_of_its_domains(self) -> None:
        fetchmail, primary = program("fetchmail"), self.primary()
        relay = self.relay(primary, domain="[domain two.example]\nprimary = %s" % primary.address)
        relay.send(recipients=["u@" + DOMAIN])
        relay.send(recipients=["u@two.example"])
        file = os.path.join(self.folder, "fetchmailrc")
        with open(file, "w", encoding="ascii", opener=lambda path, flags: os.open(path, flags, 0o600)) as stream:
            stream.write("poll 127.0.0.1 service %d protocol ETRN fetchdomains %s two.example\n" % (relay.port, DOMAIN))
        primary.start()
        done = subprocess.run([fetchmail, "--nodetach", "--nosyslog", "-f", file, "--pidfile", file + ".pid"], check=False,
                              env=dict(os.environ, HOME=self.folder, FETCHMAILHOME=self.folder),
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=DEADLINE_S)
        self.assertEqual(done.returncode, 0, done.stdout)
        for name in cases(self, [DOMAIN, "two.example"]):
            relay.logged(r"etrn: site=%s, client=unknown\[127\.0\.0\.1\], messages=\d, reply=25[03]" % re.escape(name))
        wait(relay.is_empty, "an empty spool")

    def test_msmtp_asks_for_a_queue(self) -> None:
        msmtp, primary = program("msmtp"), self.primary()
        relay = self.relay(primary, domain="probe_interval = 1h", PROBE_FIRST_S=3600.0)
        relay.send()
        relay.logged(": down: ")
        primary.start()
        for queue, status in cases(self, [("other.example", 69), (DOMAIN, 0)]):
            done = subprocess.run([msmtp, "--file=/dev/null", "--host=127.0.0.1", "--port=%d" % relay.port, "--rmqs=" + queue],
                                  check=False, stderr=subprocess.PIPE, timeout=DEADLINE_S)
            self.assertEqual(done.returncode, status, done.stderr)
        wait(relay.is_empty, "an empty spool")

    def test_the_sample_runs_as_it_is_and_small(self) -> None:
        """From a fresh folder, as a script; but its two ports are ones that are free here."""
        primary, own = self.primary(), self.primary()
        with open(SAMPLE, encoding="utf-8") as file:
            text = file.read().replace("127.0.0.1:2525", own.address).replace("127.0.0.1:2526", primary.address)
        with open(os.path.join(self.folder, "etrn.conf.sample"), "w", encoding="utf-8") as file:
            file.write(text)
        shutil.copy(SOURCE, self.folder)
        own.sock.close()
        with open(os.path.join(self.folder, "log"), "w+", encoding="utf-8") as log:
            process = subprocess.Popen([sys.executable, "etrn_relay.py", "--config", "etrn.conf.sample"], cwd=self.folder,
                                       stderr=log)
            self.addCleanup(process.wait)
            self.addCleanup(process.kill)

            def has(text: str) -> bool:
                log.seek(0)
                return text in log.read()
            wait(lambda: has("started: "), "the relay")
            self.memory_is_small(process.pid)
            with contextlib.closing(Wire(own.port)) as client:
                client.say("EHLO x")
                self.assertEqual(client.send(MESSAGE, recipients=["user@example.com"])[:3], "250")
            primary.start()
            wait(lambda: primary.messages, "the mail")
            process.terminate()
            self.assertEqual(process.wait(DEADLINE_S), 0)
        self.assertEqual(sorted(os.listdir(self.folder)), ["etrn.conf.sample", "etrn_relay.py", "log", "spool"])

    def memory_is_small(self, pid: int) -> None:
        """Under 35 MB, with a margin.  Only where Linux tells, and glibc can be asked to give back what it does not need."""
        with contextlib.suppress(OSError), open("/proc/%d/status" % pid, encoding="ascii") as file:
            octets = int(re.search(r"VmRSS:\s+(\d+) kB", file.read()).group(1)) << 10      # type: ignore[union-attr]
            if "glibc" in platform.libc_ver()[0]:
                self.assertLess(octets, 33 << 20)


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
            cls.look_at(cls, file.read())       # type: ignore[arg-type]

    def look_at(self, source: str) -> None:
        self.source = source
        self.tree = ast.parse(source)
        self.banners = sections(source)

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

    def forward(self) -> List[Tuple[int, str]]:
        """(line, name) where a section names what a later one defines."""
        defined = self.definitions()
        self.assertGreater(len(defined), 200)
        return [(node.lineno, node.id) for node in ast.walk(self.tree)
                if isinstance(node, ast.Name) and defined.get(node.id, 0) > self.section(node.lineno)[0]]

    def test_names_point_backward(self) -> None:
        self.assertEqual(self.forward(), [])

    def impurities(self) -> List[Tuple[int, str]]:
        """(line, name) where a pure section touches a socket, a file, a clock or chance."""
        forbidden = {"socket", "select", "selectors", "random", "secrets", "threading", "queue", "smtplib", "subprocess",
                     "tempfile"}
        clocks, calls = {"strftime", "gmtime", "localtime"}, {"open", "print", "input", "exec", "eval", "__import__", "globals"}
        paths = {"join", "dirname", "basename", "abspath"}
        seen, bad = set(), []
        for node in ast.walk(self.tree):
            section = self.section(getattr(node, "lineno", 0))[1]
            if section not in self.PURE:
                continue
            seen.add(section)
            if isinstance(node, ast.Name) and node.id in forbidden:
                bad.append((node.lineno, node.id))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in calls:
                bad.append((node.lineno, node.func.id))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if (node.value.id == "os" and node.attr != "path") or (node.value.id == "time" and node.attr not in clocks):
                    bad.append((node.lineno, node.value.id + "." + node.attr))
            if isinstance(node, ast.Attribute) and ast.dump(node.value) == ast.dump(ast.parse("os.path", mode="eval").body):
                if node.attr not in paths:
                    bad.append((node.lineno, "os.path." + node.attr))
        self.assertEqual(seen, self.PURE)
        return bad

    def test_pure_sections_touch_no_socket_file_clock_or_chance(self) -> None:
        self.assertEqual(self.impurities(), [])

    def impure_calls(self) -> List[Tuple[int, str]]:
        """(line, name) where a pure section names a function or class of one that is not."""
        impure = {node.name for node in self.tree.body
                  if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and self.section(node.lineno)[1] not in self.PURE}
        self.assertGreater(len(impure), 100)
        return [(node.lineno, node.id) for node in ast.walk(self.tree)
                if isinstance(node, ast.Name) and node.id in impure and self.section(node.lineno)[1] in self.PURE]

    def test_pure_sections_call_nothing_that_is_not_pure(self) -> None:
        self.assertEqual(self.impure_calls(), [])

    VIOLATIONS: Dict[str, List[Tuple[str, str]]] = {      # what finds them: (section, a line more in it)
        "impurities": [(section, line) for section in sorted(PURE) for line in (
            "os.unlink('x')", "os.path.exists('x')", "time.time()", "time.sleep(1)", "open('x')", "random.random()", "print(1)",
            "socket.socket()", "x = time.monotonic", "secrets.token_hex()", "threading.Lock()", "__import__('os')",
            "selectors.DefaultSelector()", "subprocess.run([])")],
        "impure_calls": [("SESSION", "Spool('x')"), ("SCHEDULE", "Log('x', 'y', 'z')"), ("DSN", "x = Resolver"),
                         ("STATUS", "Manager.tick")],
        "forward": [("GRAMMAR", "parse_config('')"), ("SPOOL", "Manager"), ("SESSION", "x = Scheduler"),
                    ("QUEUE", "x: Server = None"), ("SERVER", "main")]}

    def test_each_violation_is_noticed(self) -> None:
        """These tests see what they look for."""
        for name, rows in cases(self, self.VIOLATIONS.items()):
            source = self.source
            for section, line in rows:          # as the first line of that section's first function
                at = re.compile(r"\. %s ==" % section).search(source).end()                              # type: ignore[union-attr]
                at = re.compile(r"\n(?:    )*def [^\n]*:\n").search(source, at).end()                    # type: ignore[union-attr]
                source = source[:at] + re.match(r" *", source[at:]).group() + line + "    # bad\n" + source[at:]    # type: ignore[union-attr]
            other = type(self)("test_names_point_backward")
            other.look_at(source)
            self.assertEqual({line for line, _ in getattr(other, name)()},
                             {number for number, line in enumerate(source.split("\n"), 1) if line.endswith("    # bad")})
        for line in cases(self, ["import shutil", "from os import unlink", "import asyncio"]):
            other = type(self)("test_names_point_backward")
            other.look_at(self.source.replace("# == 6. SPOOL", line + "\n# == 6. SPOOL"))
            self.assertRaises(AssertionError, other.check_imports)

    def test_imports_stand_at_the_top_come_from_the_standard_library_and_are_used(self) -> None:
        self.check_imports()

    def check_imports(self) -> None:
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
        code = ("import signal, sys, threading, os\n"
                "def world(): return [signal.getsignal(n) for n in (1, 10, 15)], os.getcwd(), dict(os.environ), os.listdir('.')\n"
                "before = world(); sys.path.insert(0, %r); import etrn_relay\n"
                "print(before == world(), threading.active_count())" % HERE)
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([sys.executable, "-B", "-c", code], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                  check=False)
        self.assertEqual((done.stdout.decode().split(), done.stderr), (["True", "1"], b""))


# == 14. PROOF =================================================================
# Whether the tests above would notice: each fsync deleted, each two steps of the
# commit order swapped.  And the real thing: power cuts, kill storms, hours of
# trouble.  What takes minutes runs with --long.

Mutant = Tuple[str, str, str]           # name, text of the source, what to put there


def mutants(source: str) -> List[Mutant]:
    """Each fsync of the spool deleted, one by one, found in the source; then orders swapped and checks dropped."""
    start = source.index("# == 6. SPOOL")
    spool = source[start:source.index("# == 7. SESSION")]
    out: List[Mutant] = []
    methods = re.split(r"(?m)^(?=    def |def |class )", spool)
    for method in methods:
        name = (re.findall(r"\A\s*(?:def|class) (\w+)", method) or [""])[0]
        for line in method.split("\n"):
            if name.startswith("_durable") or name == "_sync_and_close":
                new = re.sub(r"os\.fsync\(fd\)", "pass", line)
            elif "self._durable(self.path), self._durable(self.bad)" in line:
                for gone, kept in (("path", "bad"), ("bad", "path")):
                    changed = line.replace("self._durable(self.path), self._durable(self.bad)", "self._durable(self.%s)" % kept)
                    out.append(("%s: no fsync of %s" % (name, gone), method, method.replace(line, changed)))
                continue
            else:
                new = re.sub(r"self\._sync_and_close\((\w+)\)", r"os.close(\1)",
                             re.sub(r"with self\._durable\(.*\):", "if True:", line))
            if new != line:
                count = method.count(line)
                for number in range(count):
                    at = [match.start() for match in re.finditer(re.escape(line), method)][number]
                    out.append(("%s: %s%s" % (name, line.strip(), " #%d" % number if count > 1 else ""), method,
                                method[:at] + new + method[at + len(line):]))
    return out + ORDERS


RENAMES = """\
            os.rename(os.path.join(self.incoming, id + ".eml"), os.path.join(self.path, id + ".eml"))
            os.rename(os.path.join(self.incoming, id + ".json"), os.path.join(self.path, id + ".json"))
"""
ENTER = """\
            with self._durable(self.path):
                for number in stored:
                    results[number] = self._enter(batch[number][0].id)
"""
BODY = """\
                    self._move_or_unlink(id + ".eml")
                    self._spare(id + ".eml")
                    self._spare(id + ".json")
"""
REMOVE = """\
            with self._durable(self.path):
                for number, id in enumerate(ids):
"""
MARK = """\
    for action, recipients in (("failed", failed), ("relayed", relayed)):
        if action not in told:
            told[action] = send_notice(spool, sidecar, action, recipients, cfg, ids, now)
    for one, verdict in touched:
        one["state"] = verdict.state
    is_finished = all(one["state"] != QUEUED for one in sidecar["recipients"])
    if touched and not is_finished:
        spool.replace_sidecar(id, sidecar)
"""
REPLACE = """\
            self._sync_and_close(fd)
            with self._durable(self.path):
                os.rename(temporary, path)
"""
SWEPT = """\
                    if kind == "json" and not self._has(self.path, id + ".json"):
                        self._unlink(os.path.join(self.path, id + ".eml"))
                    self._unlink(os.path.join(folder, name))
"""
STORED, SYNCED = ["""\
        except OSError as error:
            self.discard(draft)
            return self._note(error)
        return None

    %s""" % follower for follower in ("def _sync(", "@staticmethod\n    def _close_quietly(")]
ORDERS: List[Mutant] = [
    ("sidecar enters before its body", RENAMES, "".join(reversed(RENAMES.splitlines(True)))),
    ("names synced before they are entered", ENTER, ENTER.replace(
        "                for", "                pass\n            if True:\n                for")),
    ("nothing of a batch is synced", "[self._sync(draft) if result is None else result for", "[result for"),
    ("each message is synced before the next is written", """\
        results = [self._store(draft, blocks, sidecar) for draft, blocks, sidecar in batch]
        began = time.monotonic()
        results = [self._sync(draft) if result is None else result for result, (draft, _, _) in zip(results, batch)]
""", """\
        began = time.monotonic()
        results = [self._store(draft, blocks, sidecar) or self._sync(draft) for draft, blocks, sidecar in batch]
"""),
    ("the kernel is not told to write the body", "            _start_writing(draft.fd)\n", ""),
    ("the kernel is not told to write the sidecar", "            _start_writing(draft.sidecar_fd)\n", ""),
    ("the kernel is told before there is something to write", """\
            self._write(draft.sidecar_fd, format_sidecar(sidecar))
            _start_writing(draft.sidecar_fd)
""", """\
            _start_writing(draft.sidecar_fd)
            self._write(draft.sidecar_fd, format_sidecar(sidecar))
"""),
    ("body unlinked before its sidecar's removal is durable", REMOVE, REMOVE + """\
                    self._unlink(os.path.join(self.path, id + ".eml"))
"""),
    ("body emptied before its sidecar's removal is durable", REMOVE, REMOVE + """\
                    os.truncate(os.path.join(self.path, id + ".eml"), 0)
"""),
    ("finished sidecar given away before its body is moved", BODY, """\
                    self._unlink(os.path.join(self.done, id + ".json"))
                    self._move_or_unlink(id + ".eml")
                    self._spare(id + ".eml")
"""),
    ("finished body stays in the queue's folder", BODY, "".join(BODY.splitlines(True)[1:])),
    ("finished body is neither emptied nor removed", BODY, "".join(BODY.splitlines(True)[::2])),
    ("files that people linked are emptied", "            if not is_ours or found", "            if found"),
    ("files that are being read are emptied",
     "            if not is_ours or found.st_size >= BLOCK_OCTETS or", "            if not is_ours or"),
    ("recipients marked before the notice is made", MARK, """\
    for one, verdict in touched:
        one["state"] = verdict.state
    is_finished = all(one["state"] != QUEUED for one in sidecar["recipients"])
    if touched and not is_finished:
        spool.replace_sidecar(id, sidecar)
    for action, recipients in (("failed", failed), ("relayed", relayed)):
        if action not in told:
            told[action] = send_notice(spool, sidecar, action, recipients, cfg, ids, now)
"""),
    ("sidecar replaced before the new one is synced", REPLACE, """\
            with self._durable(self.path):
                os.rename(temporary, path)
            self._sync_and_close(fd)
"""),
    ("sidecar unlinked, then replaced", REPLACE, REPLACE.replace("                os.rename", """\
                self._unlink(path)
                os.rename""")),
    ("a start takes any finished sidecar's body", SWEPT, SWEPT.replace(' and not self._has(self.path, id + ".json")', "")),
    ("a start forgets the finished sidecar before the body", SWEPT, """\
                    self._unlink(os.path.join(folder, name))
                    if kind == "json" and not self._has(self.path, id + ".json"):
                        self._unlink(os.path.join(self.path, id + ".eml"))
"""),
    ("a failed commit stays", "                self._withdraw(batch[number][0].id)\n", "                pass\n"),
    ("a failed commit is withdrawn body first", "        for name in names:\n            if name == sidecar or not os",
     "        for name in reversed(names):\n            if True or not os"),
    ("a failed commit leaves its body", "        with contextlib.suppress(OSError):\n            os.rename(sidecar, back)\n", ""),
    ("a commit that cannot be undone is torn",
     "            if name == sidecar or not os.path.lexists(sidecar):", "            if True:"),
    ("a failed commit is acknowledged", "                results[number] = results[number] or error\n", ""),
    ("what cannot be written is acknowledged", STORED, STORED.replace("            return self._note(error)\n", "")),
    ("what cannot be written stays in incoming/", STORED, STORED.replace("            self.discard(draft)\n", "")),
    ("what cannot be synced is acknowledged", SYNCED, SYNCED.replace("            return self._note(error)\n", "")),
    ("what cannot be synced stays in incoming/", SYNCED, SYNCED.replace("            self.discard(draft)\n", "")),
    ("what a dead clerk began stays", "                    self.spool._withdraw(id)\n", "                    pass\n"),
    ("readers see what the clerk enters", "        self.spool.entering.update(ids)\n", ""),
    ("a dead clerk's batch is acknowledged", "                return self.spool.commit(batch)\n",
     "                return [None] * len(batch)\n"),
    ("a dead clerk's removals are told as done", "        return self.spool.remove(ids) if errors is None else",
     "        return [None] * len(ids) if errors is None else"),
    ("what the clerk cannot keep is acknowledged", "one.draft.id: error and OSError(*error) for", "one.draft.id: None for"),
    ("large messages of a batch are forgotten", "zip([one.draft.id for one in others], self.spool.commit(others))",
     "zip([one.draft.id for one in others], [None] * len(others))"),
    ("the clerk gets what is half written", "if one.draft.fd < 0 and one.draft.error is None\n", "if one.draft.error is None\n"),
    ("a large message is the clerk's", "                 and sum(map(len, one.blocks)) <= CLERK_OCTETS]", "]"),
    ("answers come in another order", "        return [errors[one.draft.id] for one in batch]",
     "        return [errors[one.draft.id] for one in [*small, *others]]"),
    ("the relay knows nothing of size and SHA-256", 'one.sidecar["size"], one.sidecar["sha256"] = size, digest', "pass"),
    ("an answer is left for the next request", "        except Exception:               # whatever it was",
     "        except (OSError, EOFError):     # whatever it was"),
    ("what is left of a clerk goes on", "                os.kill(self.process, signal.SIGKILL)\n", "                pass\n"),
    ("a clerk that is gone is asked", "        if not self.process:\n            return None\n        try:",
     "        if not self.process:\n            raise OSError\n        try:"),
    ("a dead clerk is used again", "if clerk is not None and clerk.process:", "if clerk is not None:"),
    ("children are ignored", "        signal.signal(signal.SIGCHLD, signal.SIG_DFL)", "        #"),
    ("the clerk's illness is its own", "        self.spool.sick = sick or self.spool.sick\n", ""),
    ("the clerk's health is the relay's", "        self.spool.sick = sick or self.spool.sick\n",
     "        self.spool.sick = sick\n"),
    ("the clerk is ill for ever", '        sick, self.spool.sick = self.spool.sick, ""', "        sick = self.spool.sick"),
    ("the clerk holds the relay's end", "            relay.close()\n", ""),
    ("signals are for the clerk, too", "                signal.signal(number, signal.SIG_IGN)\n", "                pass\n"),
    ("who is woken is counted as idle", "                self.idle -= 1 ", "                # "),
    ("tasks take the messages' threads", "                is_free = self.writing < self.width\n",
     "                is_free = self.writing + self.tasking < self.width\n"),
    ("the lock is not waited for", "                if self._is_alive(holder) or", "                if True or"),
    ("the lock is waited for whoever has it", "                if self._is_alive(holder) or", "                if"),
    ("a failed removal goes on with the body",
     "            return [result or error for result in results]\n", "            pass\n"),
    ("short writes are taken for whole ones", "        while done < len(data):", "        while False:"),
    ("readers see what is not yet safe", "                if id in self.entering:\n", "                if False:\n"),
    ("folder opened after the changes", "        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)\n        try:\n"
     "            yield\n            os.fsync(fd)\n",
     "        yield\n        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)\n        try:\n            os.fsync(fd)\n"),
    ("XFS is believed after it shut down", "            os.fstat(fd)                #", "            #"),
    ("a queue ID in use is taken again",
     'if self._has(self.path, draft.id + ".json") or self._has(self.path, draft.id + ".eml"):',
     "if False:"),
    ("a body of any octets is sent", 'if size != sidecar["size"] or digest.hexdigest() != sidecar["sha256"]:', "if False:"),
    ("EIO is no illness", "        if error.errno in _SICK:\n", "        if False:\n"),
    ("a sick spool heals by itself", "        except OSError:\n            return False\n        self.sick",
     "        except OSError:\n            pass\n        self.sick"),
    ("a corrupt pair is deleted", "                os.rename(os.path.join(self.path, id + kind), target)\n",
     "                os.unlink(os.path.join(self.path, id + kind))\n"),
    ("an unknown state counts as finished",
     'all(one["state"] in (QUEUED, DELIVERED, BOUNCED, EXPIRED, DELETED) for one in people)',
     "True"),
    ("a bug in a commit is told as done", "            told = len(out)\n            out.extend((done, error) for",
     "            told = len(out)\n            out.extend((done, None) for"),
    ("older state overwrites newer", "number >= self.saved.get(name, 0)", "True"),
    ("mail goes to whatever lies at the spool's path",
     "        return (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino)\n",
     "        return True\n"),
    ("a notice is made again at each attempt to record it", "        if action not in told:\n", "        if True:\n"),
    ("a deferral is insisted on", "put_off if states == {QUEUED} else None", "None"),
    ("a full done/ keeps delivered mail", "        except OSError as error:\n            if error.errno != errno.ENOENT and",
     "        except OSError as error:\n            if True or"),
]


class Mutations(unittest.TestCase):
    """Each must make a test fail; with -v their names are listed."""

    WATCHERS = ("PowerCuts", "SpoolCrashes", "SpoolFaults", "SpoolStates", "SpoolPeople", "Clerks", "Recording")
    # Who notices it, where that is not the power cuts in the spool and Clerks behind it.
    NEAREST = dict(
        [(name, "SpoolPeople") for name in (
            "files that are being read are emptied", "files that people linked are emptied",
            "a queue ID in use is taken again", "a bug in a commit is told as done", "an unknown state counts as finished",
            "mail goes to whatever lies at the spool's path", "a full done/ keeps delivered mail")]
        + [(name, "SpoolStates") for name in ("a body of any octets is sent", "older state overwrites newer")]
        + [(name, "SpoolFaults") for name in (
            "what cannot be synced stays in incoming/", "what cannot be synced is acknowledged")]
        + [(name, "Recording") for name in (
            "a deferral is insisted on", "a notice is made again at each attempt to record it")]
        + [(name, "Clerks") for name in (
            "the kernel is not told to write the body", "the kernel is not told to write the sidecar",
            "the kernel is told before there is something to write", "each message is synced before the next is written",
            "the lock is waited for whoever has it", "the lock is not waited for")])

    def test_each_mutation_finds_its_place(self) -> None:
        with open(SOURCE, encoding="utf-8") as file:
            source = file.read()
        rows = mutants(source)
        self.assertGreater(len([row for row in rows if row not in ORDERS]), 10)
        self.assertEqual([name for name, old, _ in rows if source.count(old) != 1], [])

    @long_run
    def test_each_mutation_of_the_first_third_is_noticed(self) -> None:
        self.notice(0)

    @long_run
    def test_each_mutation_of_the_second_third_is_noticed(self) -> None:
        self.notice(1)

    @long_run
    def test_each_mutation_of_the_last_third_is_noticed(self) -> None:
        self.notice(2)

    def notice(self, part: int) -> None:
        with open(SOURCE, encoding="utf-8") as file:
            source = file.read()
        module = sys.modules[__name__]
        if part == 0:
            self.assertEqual(self.first_failure(), "", "without any mutation")
        missed = []
        for name, old, new in mutants(source)[part::3]:
            mutant = load_mutant(source.replace(old, new))
            with mock.patch.object(module, "etrn", mutant):
                nearest = "Clerks" if source.index(old) > source.index("\nclass Clerk:") else "PowerCuts"
                failed = self.first_failure(self.NEAREST.get(name, nearest))
            gc.collect()                # a module is a cycle, and there are a hundred of them
            print("%-75.75s %s" % (name, failed or "SURVIVED"), file=sys.stderr, flush=True)
            if not failed:
                missed.append(name)
        self.assertEqual(missed, [])

    def first_failure(self, nearest: str = "") -> str:
        """The name of the first test that notices, or nothing.  `nearest` is asked first, all others after it."""
        for name in sorted(self.WATCHERS, key=lambda name: name != nearest):
            suite = unittest.TestLoader().loadTestsFromTestCase(globals()[name])
            result = unittest.TestResult()
            result.failfast = True
            with contextlib.redirect_stderr(io.StringIO()):
                suite.run(result)
            for test, _ in result.failures + result.errors:
                return str(test.id()).partition(".")[2]
        return ""


def load_mutant(source: str) -> Any:
    module = types.ModuleType("etrn_mutant")
    sys.modules["etrn_mutant"] = module         # dataclasses look there
    exec(compile(source, "etrn_mutant", "exec"), vars(module))
    return module


# -- an hour of trouble, in seconds

class Trouble:
    """A primary that comes and goes, greylists, says 421 and is far away; and
    what the loop does with a Site, event by event, with both clocks in hand."""

    def __init__(self, test: unittest.TestCase, seed: int, domain: str = "") -> None:
        self.test = test
        self.chance = random.Random(seed)
        self.clock = Clock()
        self.scheduler = etrn.Scheduler(config("", domain or "retry_interval = 1m\nmax_retry_interval = 10m\nconnections = 5"))
        self.site = self.scheduler.site(DOMAIN, self.clock.now)
        self.events: List[Tuple[float, int, Callable[[], None]]] = []       # heap of (monotonic, tie, what)
        self.ties = itertools.count()
        self.is_up = self.is_refusing = False
        self.steady_since = 0.0                 # monotonic, since when the primary has answered everything well
        self.lines: Dict[int, List[etrn.Entry]] = {}    # open connections: messages given to them
        self.leaving: Set[int] = set()          # those that end after what they have
        self.rejected = 0
        self.opening = 0
        self.tried: Dict[str, float] = {}       # message: monotonic, when it came or was last tried or released
        self.met: Dict[str, bool] = {}          # message: greylisted before
        self.delivered = self.arrived = self.expired = self.steps = self.most_lines = self.most_entries = 0

    def at(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.clock.mono + seconds, next(self.ties), what))

    @property
    def now(self) -> etrn.Now:
        return self.clock.now

    def burst(self) -> None:
        for _ in range(self.chance.randint(20, 250)):
            self.arrive()

    def arrive(self) -> None:
        id = "%06X" % (0x100000 + self.arrived)
        self.arrived += 1
        entry = etrn.Entry(id, self.chance.randrange(1, 10000), self.now.wall, self.now.wall + self.site.cfg.lifetime)
        self.site.add(entry, self.now)
        self.tried[id] = self.clock.mono
        self.most_entries = max(self.most_entries, len(self.site.entries))

    def flap(self) -> None:
        self.is_up = not self.is_up
        self.steady_since = self.clock.mono

    def err(self) -> None:
        """It is there but half-configured for a while: 550 for everybody."""
        self.is_refusing = True
        self.at(self.chance.uniform(5, 300), self.come_to_its_senses)

    def come_to_its_senses(self) -> None:
        self.is_refusing, self.steady_since = False, self.clock.mono

    def tick(self) -> None:
        """As Manager.tick()."""
        site = self.site
        while site.entries and site.wanted(self.now):
            site.on_started(self.now)
            self.opening += 1
            slow = self.chance.choice([0.001, 0.02, 0.5, 5.0])
            self.at(slow if self.is_up else self.chance.choice([0.001, slow, 30.0]), self.greet)
        for line in list(self.lines):
            self.feed(line)
        for entry in site.expired(self.now):
            site.start(entry)
            self.leave(entry)
            self.expired += 1
        site.delayed(self.now)

    def greet(self) -> None:
        self.opening -= 1
        if not self.is_up or self.chance.random() < 0.02:
            self.site.on_failed(self.now, "refused")
            return
        line = next(self.ties)
        self.lines[line] = []
        self.most_lines = max(self.most_lines, len(self.lines))
        self.site.on_connected(self.now)
        self.feed(line)

    def feed(self, line: int) -> None:
        if line in self.lines and (line in self.leaving or self.site.open > self.site.limit):
            self.leaving.add(line)              # it ends after what it has
            self.idle(line)
        elif line in self.lines and len(self.lines[line]) < etrn.JOBS_REFILL:
            fresh = self.site.take(etrn.JOBS_PER_CONNECTION, self.now)
            is_idle = not self.lines[line]
            self.lines[line] += fresh
            if fresh and is_idle:
                self.send(line)
            elif is_idle:
                self.at(etrn.IDLE_CONNECTION_S, lambda: self.idle(line))

    def idle(self, line: int) -> None:
        if line in self.lines and not self.lines[line]:
            del self.lines[line]
            self.site.on_closed(self.now, "")

    def send(self, line: int) -> None:
        self.at(self.chance.choice([0.001, 0.003, 0.05, 0.3]), lambda: self.answer(line))

    def answer(self, line: int) -> None:
        """The primary's word on the first message of a connection."""
        if line not in self.lines:
            return
        entries, site = self.lines[line], self.site
        entry = entries[0]
        word = self.chance.choices(["taken", "grey", "421", "cut", "5xx"], [90, 6, 1, 1, 1])[0] if self.is_up else "cut"
        if word == "grey" and self.met.get(entry.id) or word == "taken" and self.met.setdefault(entry.id, False):
            word = "taken"
        if self.is_refusing and word != "cut":
            word = "5xx"
        if word in ("421", "cut"):
            del self.lines[line]
            for one in entries:
                self.tried[one.id] = self.clock.mono
                if site.entries.get(one.id) is one and one.state is etrn.State.DELIVERING:
                    site.give_back(one)
            site.on_closed(self.now, word)
            return
        entries.pop(0)
        self.tried[entry.id] = self.clock.mono
        if site.entries.get(entry.id) is entry:
            if word == "taken":
                site.on_taken(self.now)
                self.delivered += 1
                self.leave(entry)
            else:
                self.met[entry.id] = True
                if word == "grey" or not site.on_refused(self.now, entry.id, []):
                    site.on_deferred(self.now)
                else:                           # rejecting: connections end with what they have not begun
                    self.rejected += 1
                    for other, its in self.lines.items():
                        self.leaving.add(other)
                        for one in its[other != line:]:
                            self.tried[one.id] = self.clock.mono
                            if site.entries.get(one.id) is one and one.state is etrn.State.DELIVERING:
                                site.give_back(one)
                        del its[other != line:]
                site.count_attempt(entry)
                site.defer(entry, self.now, site.pause(entry.deferrals, self.now))
        if entries:
            self.send(line)
        else:
            self.feed(line)

    def leave(self, entry: etrn.Entry) -> None:
        self.site.drop(entry.id)
        del self.tried[entry.id]

    def operator(self) -> None:
        """Commands, ETRN, SIGHUP, and clocks that are set."""
        site = self.site
        entries = list(site.entries.values())
        what = self.chance.choice(["flush", "etrn", "hold", "release", "hold one", "config", "jump", "client"])
        if what in ("flush", "etrn"):
            site.flush(self.now)
        elif what in ("hold", "release"):
            site.hold_all(what == "hold" and self.chance.random() < 0.3)
        elif what == "hold one" and entries:
            site.hold(self.chance.choice(entries), self.chance.random() < 0.3)
        elif what == "config":
            values = self.chance.randint(1, 8), self.chance.choice(["off", "10m"])
            self.scheduler.reconfigure(config("", "retry_interval = 1m\nmax_retry_interval = 10m\nconnections = %d\n"
                                              "delay_notice = %s" % values), self.now)
        elif what == "jump":
            seconds = self.chance.choice([-7200, -100, 100, 7200, 30 * 86400, -30 * 86400])
            self.clock.jump(seconds)
            site.on_clock_jump(self.now, seconds)
        elif what == "client":
            site.trigger(self.now)
        for id in self.tried:                   # whoever was held waits from now on
            if what in ("hold", "release", "hold one"):
                self.tried[id] = self.clock.mono

    def check(self) -> None:
        site, test = self.site, self.test
        states = collections.Counter(entry.state for entry in site.entries.values())
        test.assertEqual({state: count for state, count in site.count.items() if count}, dict(states))
        flying = [entry.id for entries in self.lines.values() for entry in entries if site.entries.get(entry.id) is entry]
        test.assertEqual(sorted(flying), sorted(entry.id for entry in site.entries.values()
                                                if entry.state is etrn.State.DELIVERING))
        test.assertEqual((site.opening, site.open), (self.opening, len(self.lines)))
        test.assertEqual(site.octets, sum(entry.size for entry in site.entries.values()))
        test.assertTrue(1 <= site.limit <= site.cfg.connections)
        test.assertLessEqual(site.round_left, len(site.entries))
        test.assertGreaterEqual(site.round_left, 0)
        if self.steps % 97 == 0:
            heaped = {id for _, id in site.active + site.deferred}
            test.assertEqual({id for id, entry in site.entries.items() if id not in heaped
                              and entry.state in (etrn.State.ACTIVE, etrn.State.DEFERRED)}, set(), "in no heap")
        for heap in (site.active, site.deferred, site.aging, site.delays):
            test.assertLessEqual(len(heap), 2 * self.most_entries + 1000)
        for id, entry in site.entries.items():
            if entry.state in (etrn.State.ACTIVE, etrn.State.DEFERRED) and self.is_up and not self.is_refusing:
                waited = self.clock.mono - max(self.tried[id], self.steady_since)
                test.assertLess(waited, site.cfg.max_retry_interval + 300, "%s %s is stuck" % (id, entry.state))

    def run(self, seconds: float, is_quiet: bool = False) -> None:
        """Let time pass, event by event."""
        end = self.clock.mono + seconds
        while self.clock.mono < end:
            self.tick()
            times = [end]
            if self.events:
                times.append(self.events[0][0])
            at = self.site.wake(self.now) if self.site.entries else None
            if at is not None:
                times.append(at)
            self.clock.advance(max(0.0, min(times) - self.clock.mono))
            while self.events and self.events[0][0] <= self.clock.mono:
                heapq.heappop(self.events)[2]()
            self.steps += 1
            if self.steps % 5 == 0 or len(self.site.entries) < 30:
                self.check()
            self.test.assertLess(self.steps, 3000000, "it spins")
            if is_quiet and not self.site.entries:
                return

    def again(self, low: float, high: float, what: Callable[[], None]) -> None:
        """Do something every now and then."""
        def now_and_then() -> None:
            if not self.is_over:
                what()
                self.again(low, high, what)
        self.at(self.chance.uniform(low, high), now_and_then)

    is_over = False


class Soak(unittest.TestCase):
    def hours(self, seed: int, hours: float) -> Trouble:
        self.row = seed
        trouble = Trouble(self, seed)
        trouble.again(0.2, 6.0, trouble.arrive)
        trouble.again(60.0, 900.0, trouble.burst)
        trouble.again(5.0, 400.0, trouble.flap)
        trouble.again(300.0, 1500.0, trouble.err)
        trouble.again(10.0, 200.0, trouble.operator)
        trouble.run(3600 * hours)
        trouble.is_over = True
        trouble.site.hold_all(False)
        for entry in trouble.site.entries.values():
            trouble.site.hold(entry, False)
        trouble.is_up, trouble.is_refusing, trouble.steady_since = True, False, trouble.clock.mono
        trouble.tried = dict.fromkeys(trouble.tried, trouble.clock.mono)
        trouble.run(7200, is_quiet=True)
        self.assertEqual(trouble.site.entries, {})
        self.assertEqual(trouble.delivered + trouble.expired, trouble.arrived)
        return trouble

    def test_an_hour_of_trouble_leaves_nothing_stuck(self) -> None:
        lines = delivered = rejected = 0
        for seed in range(4):
            trouble = self.hours(seed, 1.0)
            rejected += trouble.rejected
            lines, delivered = max(lines, trouble.most_lines), delivered + trouble.delivered
        self.assertGreater(delivered, 2000)
        self.assertGreater(rejected, 1)
        self.assertGreater(lines, 2)
        self.assertLessEqual(lines, 9)

    @long_run
    def test_many_hours_of_trouble_leave_nothing_stuck(self) -> None:
        for seed in range(100, 130):
            self.hours(seed, 4.0)


# -- the real thing

class Taker(Primary):
    """A primary that knows which connection brought what, and how that ended."""

    def __init__(self, **script: Any) -> None:
        super().__init__(**script)
        self.copies: List[Tuple[int, bytes]] = []       # (connection, mark) in the order of taking, answered or not
        self.quits: Set[int] = set()                    # connections that ended in good order
        self.numbers: Dict[socket.socket, int] = {}
        self.serial = itertools.count()

    def _talk(self, sock: socket.socket, lines: io.BufferedReader) -> None:
        self.numbers[sock] = next(self.serial)
        super()._talk(sock, lines)

    def on_data(self, sock: socket.socket, data: bytes) -> None:
        self.copies.append((self.numbers[sock], mark_of(data)))

    def _say(self, sock: socket.socket, verb: str, argument: str, default: str, *taken: Callable[[], None]) -> str:
        if verb == "QUIT":
            self.quits.add(self.numbers[sock])
        return super()._say(sock, verb, argument, default, *taken)


def mark_of(data: bytes) -> bytes:
    return re.search(rb"(?m)^Subject: (\S+)", data).group(1)       # type: ignore[union-attr]


def marked(mark: bytes) -> bytes:
    return b"Subject: %s\r\n\r\n%s\r\n" % (mark, mark * (1 + hash(mark) % 200))


class Senders:
    """Clients that send as fast as they are let, come back after every failure, and note each 250 in a ledger."""

    def __init__(self, relay: Relay, number: int, recipients: Sequence[str] = ("user@" + DOMAIN,), pause_s: float = 0.0) -> None:
        self.relay, self.recipients, self.pause_s = relay, recipients, pause_s
        self.ledger: List[bytes] = []
        self.is_over = threading.Event()
        self.threads = [threading.Thread(target=self._run, args=(one,), daemon=True) for one in range(number)]
        for thread in self.threads:
            thread.start()

    def _run(self, number: int) -> None:
        counter = itertools.count()
        while not self.is_over.is_set():
            with contextlib.suppress(OSError, IndexError, ValueError):
                with self.relay.client() as client:
                    while not self.is_over.is_set():
                        mark = b"%d-%d" % (number, next(counter))
                        reply = client.send(marked(mark), recipients=self.recipients)
                        if reply[:3] == "250":
                            self.ledger.append(mark)
                        elif reply[:1] != "4":
                            break
                        self.is_over.wait(self.pause_s)
            self.is_over.wait(0.02)

    def stop(self) -> List[bytes]:
        self.is_over.set()
        for thread in self.threads:
            thread.join(DEADLINE_S)
        return self.ledger


class Ledgers(Relays):
    def compare(self, primary: Primary, relay: Relay, ledger: Iterable[bytes]) -> Dict[bytes, int]:
        """Every 250 was delivered, intact; returns the number of copies of each."""
        wait(relay.is_empty, "an empty spool", 3 * DEADLINE_S)
        found = collections.Counter(mark_of(data) for _, _, data in primary.messages)
        self.assertEqual([mark for mark in ledger if not found[mark]], [])
        for _, _, data in primary.messages:
            self.assertEqual(without_received(data), marked(mark_of(data)))
        self.assertEqual(os.listdir(os.path.join(relay.spool, "corrupt")), [])
        return found


class Sickness(Relays):
    """A disk that fails under a running relay, and is well again."""

    WRITING = ("write", "fsync", "rename", "unlink", "ftruncate")

    def test_every_failing_disk_is_answered_4xx_and_outlived(self) -> None:
        for fault, has_clerk in cases(self, itertools.product(
                [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE], [False, True])):
            primary = self.primary()
            folder = tempfile.mkdtemp(dir=self.folder)
            fails = os.path.join(folder, "fails")       # a file, so that the clerk hears of it
            shim = types.SimpleNamespace(**vars(os))

            def failing(real: Callable[..., Any], fault: int = fault, fails: str = fails) -> Callable[..., Any]:
                def call(*arguments: Any, **options: Any) -> Any:
                    is_meant = real is not os.open or fault == errno.EMFILE or arguments[1] & os.O_CREAT
                    if is_meant and os.path.exists(fails):
                        raise OSError(fault, os.strerror(fault))
                    return real(*arguments, **options)
                return call
            for name in (*self.WRITING, "open"):
                if fault != errno.EMFILE or name == "open":
                    setattr(shim, name, failing(getattr(os, name)))
            with shorten(RETRY_DISK_S=0.1, SWEEP_S=0.05, PROBE_FIRST_S=0.05), mock.patch.object(etrn, "os", shim), Local(
                    folder, domain="[domain two.example]\nprimary = %s\nrecipients = any\ncutthrough = no\nprobe_interval = 1s\n"
                    % primary.address, has_clerk=has_clerk) as local, Wire(local.port) as client:
                client.say("EHLO client.example")
                self.assertEqual(client.send(marked(b"first"), recipients=["x@two.example"])[:3], "250")
                os.mkdir(fails)
                expected = "452 4.3.1" if fault in (errno.ENOSPC, errno.EDQUOT) else "451 4.3.0"
                for data in (MESSAGE, b"x" * 600000 + b"\r\n", MESSAGE):
                    self.assertEqual(client.send(data)[:9], expected)
                self.assertEqual(bool(local.spool.sick), fault in (errno.EIO, errno.EROFS))
                primary.start()
                if fault != errno.EMFILE:               # delivery goes on; without descriptors nothing can be read
                    wait(lambda: primary.messages, "a delivery")            # noqa: B023
                os.rmdir(fails)
                wait(lambda: client.send(marked(b"last"), recipients=["x@two.example"])[:3] == "250", "new mail")   # noqa: B023
                wait(lambda: not spool_files(local.spool.path), "an empty spool")       # noqa: B023
                self.assertEqual([mark_of(data) for _, _, data in primary.messages], [b"first", b"last"])
                self.assertEqual(os.listdir(local.spool.incoming), [])
            self.assertEqual([line for line in local.log if "bug" in line or "has ended" in line], [])


class Storms(Ledgers):
    """Relay and primary die at random, under load, for a while."""

    def storm(self, seed: int, seconds: float, relay_dies: bool) -> None:
        self.row = seed
        chance = random.Random(seed)
        primary = Taker()
        self.addCleanup(primary.__exit__)
        primary.start()
        relay = self.relay(primary, relay="max_connections_per_client = 0")
        senders = Senders(relay, 6, pause_s=0.01)
        end = time.monotonic() + seconds
        kills = stops = 0
        while time.monotonic() < end:
            time.sleep(chance.uniform(0.05, 0.6))       # the storm's own time: how long each calm lasts
            if relay_dies and chance.random() < 0.6:
                kills += 1
                self.assertEqual(relay.end(signal.SIGKILL), -signal.SIGKILL)
                relay.start()
            elif primary.is_up:
                stops += 1
                primary.stop()
            else:
                primary.start()
        ledger = senders.stop()
        if not primary.is_up:
            primary.start()
        self.compare(primary, relay, ledger)
        self.assertGreater(len(ledger), 20)
        self.assertGreater(stops + kills, 1)
        broken = collections.Counter()                  # type: collections.Counter[int]
        last = {mark: number for number, (_, mark) in enumerate(primary.copies)}
        for number, (connection, mark) in enumerate(primary.copies):
            if number != last[mark]:                    # another copy came later: this one's answer was not heard
                self.assertNotIn(connection, primary.quits, "sent twice although its connection ended well")
                broken[connection] += 1
        if not relay_dies:                              # then at most the one that was being answered
            self.assertLessEqual(max(broken.values(), default=0), 1)
        print("storm %d: %d acknowledged, %d copies too many, relay killed %d times, primary %d times" % (
            seed, len(ledger), sum(broken.values()), kills, stops), file=sys.stderr)

    def test_a_primary_that_dies_gets_at_most_one_copy_too_many_for_each_connection(self) -> None:
        self.storm(1, 1.5, False)

    def test_a_storm_of_kills_loses_nothing(self) -> None:
        self.storm(2, 2.0, True)

    @long_run
    def test_long_storms_lose_nothing(self) -> None:
        for seed in range(10, 14):
            self.storm(seed, 15.0, seed % 2 == 0)


def children_of(pid: int) -> List[int]:
    """Processes that it started and that have not ended."""
    out = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open("/proc/%s/stat" % name, encoding="utf-8") as file:
            state, parent = file.read().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                out.append(int(name))
    return out


class ClerksOfRelays(Ledgers):
    """The process beside the relay's, from outside."""

    def clerk_of(self, relay: Relay) -> int:
        assert relay.process is not None
        clerk, = children_of(relay.process.pid)
        return clerk

    @staticmethod
    def is_alive(pid: int) -> bool:
        try:
            with open("/proc/%d/stat" % pid, encoding="utf-8") as file:
                return file.read().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    def end_of(self, pid: int) -> None:
        if self.is_alive(pid):
            os.kill(pid, signal.SIGKILL)

    def test_a_clerk_that_stands_still_does_not_keep_the_relay_from_ending_nor_the_next_from_starting(self) -> None:
        relay = self.relay(STOP_S=2.0, STOP_DISK_S=0.3)
        clerk = self.clerk_of(relay)
        self.addCleanup(self.end_of, clerk)
        with relay.client() as client:
            client.say("MAIL FROM:<a@x.example>", "RCPT TO:<user@%s>" % DOMAIN, "DATA")
            os.kill(clerk, signal.SIGSTOP)
            client.raw(MESSAGE + b".\r\nNOOP\r\n")
            assert relay.process is not None
            relay.process.terminate()
            self.assertEqual(relay.process.wait(DEADLINE_S), 0)     # its standard error is the clerk's, too, and stays open
            reply = client.reply()
        wait(lambda: not self.is_alive(clerk), "the clerk's end")
        relay.start()
        self.assertIn(len(relay.queue()), (1,) if reply[:3] == "250" else (0, 1))

    def test_a_clerk_killed_under_load_costs_nothing_and_is_told_once(self) -> None:
        primary = Taker()
        self.addCleanup(primary.__exit__)
        relay = self.relay(primary, relay="max_connections_per_client = 0")
        clerk = self.clerk_of(relay)
        refused: List[str] = []
        ledger: List[bytes] = []

        def send(number: int) -> None:
            with relay.client() as client:
                for serial in range(60):
                    mark = b"%d-%d" % (number, serial)
                    reply = client.send(marked(mark))
                    if reply[:3] == "250":
                        ledger.append(mark)
                    else:
                        refused.append(reply)
        threads = [threading.Thread(target=send, args=(number,), daemon=True) for number in range(8)]
        for thread in threads:
            thread.start()
        wait(lambda: len(ledger) > 100, "some messages")
        os.kill(clerk, signal.SIGKILL)
        for thread in threads:
            thread.join(DEADLINE_S)
        self.assertEqual((len(ledger), refused), (480, []))
        relay.logged(r"master\[\d+\]: warning: a process of ours that writes the spool has ended")
        self.assertEqual(len(relay.files()), 960)
        primary.start()
        copies = self.compare(primary, relay, ledger)
        self.assertEqual((len(copies), max(copies.values())), (480, 1))
        self.assertEqual(sum("has ended" in line for line in relay.log), 1)
        self.assertEqual(relay.end(), 0)

    def test_no_process_is_left_however_the_relay_ends(self) -> None:
        relay = self.relay()
        for number, status in cases(self, [(signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)]):
            clerk = self.clerk_of(relay)
            self.assertEqual(relay.send()[:3], "250")
            self.assertEqual(relay.end(number), status)
            if status == 0:
                self.assertFalse(self.is_alive(clerk))      # gone before the relay was
            wait(lambda clerk=clerk: not self.is_alive(clerk), "the clerk's end", 5.0)
            relay.start()
        self.assertEqual(len(relay.queue()), 3)

    def test_a_start_right_after_a_kill_waits_for_the_clerk(self) -> None:
        relay = self.relay()
        self.assertEqual(relay.send()[:3], "250")
        clerk = self.clerk_of(relay)
        os.kill(clerk, signal.SIGSTOP)                      # as a disk that does not answer would
        self.addCleanup(self.end_of, clerk)
        last = relay.process
        assert last is not None
        last.kill()
        last.wait(DEADLINE_S)                               # its standard error is the clerk's, too, and stays open
        thread = threading.Thread(target=relay.start, daemon=True)
        thread.start()

        def is_waiting() -> bool:
            with contextlib.suppress(OSError):
                if relay.process is not None and relay.process is not last:
                    folder = "/proc/%d/fd" % relay.process.pid
                    return any(os.readlink(os.path.join(folder, name)).endswith("/lock") for name in os.listdir(folder))
            return False
        wait(is_waiting, "a relay at the lock")
        self.assertEqual(relay.log[-1:], [line for line in relay.log[-1:] if "started" not in line])
        os.kill(clerk, signal.SIGCONT)
        thread.join(DEADLINE_S)
        self.assertFalse(thread.is_alive())
        self.assertEqual(len(relay.queue()), 1)

    def test_a_signal_to_all_processes_of_a_relay_is_one_to_the_relay(self) -> None:
        relay = Relay(self.folder, "127.0.0.1:9")
        relay.prefix = ["setsid"]
        self.addCleanup(relay.__exit__)
        relay.start()
        assert relay.process is not None
        clerk = self.clerk_of(relay)
        for number, line in cases(self, [(signal.SIGHUP, "configuration reread"), (signal.SIGUSR1, "signal: site=all")]):
            os.killpg(relay.process.pid, number)
            relay.logged(line)
        self.assertEqual((relay.send()[:3], self.clerk_of(relay)), ("250", clerk))
        os.killpg(relay.process.pid, signal.SIGTERM)
        self.assertEqual(relay.process.wait(DEADLINE_S), 0)
        self.assertEqual([self.is_alive(clerk), len(relay.files())], [False, 2])
        self.assertEqual([line for line in relay.log if "has ended" in line], [])

    def test_where_no_process_can_be_had_the_relay_does_without(self) -> None:
        failing = "import os\ndef fork(): raise OSError(11, 'Resource temporarily unavailable')\nos.fork = fork\n" + STARTER
        with mock.patch.object(sys.modules[__name__], "STARTER", failing):
            relay = self.relay()
        relay.logged(r"warning: no process to write the spool: Resource temporarily unavailable; the relay writes itself")
        assert relay.process is not None
        self.assertEqual((children_of(relay.process.pid), relay.send()[:3]), ([], "250"))
        self.assertEqual(relay.end(), 0)

    def test_whoever_hangs_up_in_the_middle_of_a_deletion_leaves_no_watch_behind(self) -> None:
        with shorten(END_BATCH=1), Local(self.folder) as local, Wire(local.port) as client:
            client.say("EHLO client.example")
            for _ in range(8):
                self.assertEqual(client.send(MESSAGE)[:3], "250")
            manager, real, goes_on = local.server.manager, local.spool.read_sidecar, threading.Event()

            def read(id: str) -> Dict[str, Any]:
                goes_on.wait(DEADLINE_S)
                return real(id)
            with mock.patch.object(local.spool, "read_sidecar", read), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.connect(os.path.join(local.spool.path, "control"))
                sock.sendall(b'{"command": "delete", "what": "all"}\n')
                wait(lambda: manager.watches, "the command to begin")
                sock.close()
                wait(lambda: not local.server.controllers, "the end of the command")
                self.assertEqual(manager.watches, [])
                goes_on.set()
                wait(lambda: not manager.chains, "what was begun")


class Mounts(Ledgers):
    """On file systems of their own, which only root can make."""

    def mount(self, kind: str, size: str, options: str = "") -> str:
        """A folder with a fresh file system on it; skips the test where that cannot be."""
        if os.geteuid() != 0:
            self.skipTest("only root can mount")
        folder = tempfile.mkdtemp(dir=self.folder)
        if kind == "tmpfs":
            command = ["mount", "-t", "tmpfs", "-o", "size=" + size, "tmpfs", folder]
        else:
            if not shutil.which("mkfs." + kind):
                self.skipTest("there is no mkfs." + kind)
            self.image = folder + ".image"
            with open(self.image, "wb") as file:
                file.truncate(320 << 20)        # sparse; xfs wants 300 MB
            self.command("mkfs." + kind, "-q", self.image)
            command = ["mount", "-o", "loop" + options, self.image, folder]
        self.command(*command)
        self.addCleanup(subprocess.run, ["umount", "-l", folder], stderr=subprocess.DEVNULL)
        return folder

    def command(self, *words: str) -> None:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            self.skipTest("%s: %s" % (words[0], done.stdout.decode("utf-8", "replace").strip()[:200]))

    def remount(self, folder: str) -> None:
        """The journal is read, as after a start of the machine.  While somebody
        with a mount namespace of his own still has the old one, that is what comes back."""
        def is_fresh() -> bool:
            self.command("umount", folder)
            self.command("mount", "-o", "loop", self.image, folder)
            with contextlib.suppress(OSError):          # reading is no proof: the old one still has it in memory
                with open(os.path.join(folder, "fresh"), "wb") as file:
                    os.fsync(file.fileno())
                return True
            return False
        wait(is_fresh, "a file system that is not the one whose power was cut")

    def cut_power(self, folder: str) -> None:
        """The file system forgets what is not on its disk, and does nothing more: EXT4_IOC_SHUTDOWN, XFS_IOC_GOINGDOWN."""
        fd = os.open(folder, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, 0x8004587D, struct.pack("I", 2))        # 2: not even the journal is written
        except OSError as error:
            self.skipTest("no power cut here: %s" % error)
        finally:
            os.close(fd)

    def power_cuts(self, kind: str, times: int) -> None:
        folder = self.mount(kind, "")
        primary = Taker()
        self.addCleanup(primary.__exit__)
        chance = random.Random(times)
        home = os.path.join(folder, "home")
        os.mkdir(home)
        os.sync()                               # the folder above the relay's is not its to make durable
        relay = Relay(home, primary.address, relay="max_connections_per_client = 0")
        self.addCleanup(relay.__exit__)
        for number in range(times):
            relay.write_config()
            os.sync()
            relay.start()
            if number % 2:
                primary.start()                 # then deliveries are cut, too
            senders = Senders(relay, 6, [one + "@" + DOMAIN for one in "abc"[:1 + number % 3]])
            wait(lambda senders=senders: len(senders.ledger) > 30, "mail")
            senders.is_over.wait(chance.uniform(0.0, 0.5))
            self.cut_power(folder)
            senders.stop()
            relay.end(signal.SIGKILL)
            if primary.is_up:
                primary.stop()
            self.remount(folder)
            primary.start()
            relay.start()
            self.compare(primary, relay, senders.ledger)
            primary.messages.clear()
            primary.stop()
            self.assertEqual(relay.end(), 0)

    def test_a_power_cut_under_load_loses_nothing_on_ext4(self) -> None:
        self.power_cuts("ext4", 1)

    @long_run
    def test_many_power_cuts_lose_nothing_on_ext4(self) -> None:
        self.power_cuts("ext4", 12)

    @long_run
    def test_many_power_cuts_lose_nothing_on_xfs(self) -> None:
        self.power_cuts("xfs", 12)

    def test_a_full_disk_takes_no_mail_but_lets_it_leave(self) -> None:
        folder = self.mount("tmpfs", "1M")
        greylisted: Set[str] = set()

        def rcpt(argument: str) -> Optional[str]:
            is_new = argument not in greylisted
            greylisted.add(argument)
            return "450 4.2.0 Greylisted" if is_new and "grey" in argument else None
        primary = self.primary(RCPT=rcpt)
        relay = Relay(folder, primary.address, domain="retry_interval = 1s\nmax_retry_interval = 1s")
        self.addCleanup(relay.__exit__)
        relay.start()
        for number in range(5):
            self.assertEqual(relay.send(marked(b"m%d" % number), recipients=["u%d@%s" % (number, DOMAIN)])[:3], "250")
            self.assertEqual(relay.send(marked(b"g%d" % number), recipients=["grey%d@%s" % (number, DOMAIN)])[:3], "250")
        with open(os.path.join(folder, "filler"), "wb", 0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 4096)
        reply = relay.send(b"x" * 300000 + b"\r\n")
        self.assertEqual(reply[:9], "452 4.3.1")
        self.assertEqual(relay.send(MESSAGE)[:9], "452 4.3.1")
        self.assertEqual(os.listdir(os.path.join(relay.spool, "incoming")), [])
        os.sync()
        primary.start()
        wait(relay.is_empty, "all mail to leave the full disk")
        self.assertEqual(sorted(mark_of(data) for _, _, data in primary.messages),
                         sorted([b"m%d" % number for number in range(5)] + [b"g%d" % number for number in range(5)]))
        os.unlink(os.path.join(folder, "filler"))
        self.assertEqual(relay.send(marked(b"last"))[:3], "250")
        wait(lambda: len(primary.messages) == 11, "new mail")

    @long_run
    def test_a_hundred_thousand_messages_and_as_many_strangers(self) -> None:
        relay = Relay(self.folder, "127.0.0.1:9", domain="probe_interval = 1h", PROBE_FIRST_S=3600.0)
        self.addCleanup(relay.__exit__)
        relay.start()
        self.assertEqual(relay.send(MESSAGE)[:3], "250")
        name, = [one for one in relay.files() if one.endswith(".json")]
        with open(os.path.join(relay.spool, name), "rb") as file:
            sidecar = file.read()
        for number in range(100000):
            id = "%X" % (0x10000000 + number)
            if number % 50000 == 0:             # ext4 gives a file 65,000 names at most
                body = os.path.join(relay.spool, id + ".eml")
                shutil.copy(os.path.join(relay.spool, name[:-5] + ".eml"), body)
            else:
                os.link(body, os.path.join(relay.spool, id + ".eml"))
            with open(os.path.join(relay.spool, id + ".json"), "wb") as file:
                file.write(sidecar.replace(name[:-5].encode(), id.encode()))
            if number % 5 == 0:
                with open(os.path.join(relay.spool, "stranger%d" % number), "wb"):
                    pass
        began = time.monotonic()
        relay.signal(signal.SIGHUP)
        slowest = 0.0

        def is_loaded() -> bool:
            nonlocal slowest
            sent = time.monotonic()
            self.assertEqual(relay.send(MESSAGE)[:3], "250")         # mail is taken meanwhile
            slowest = max(slowest, time.monotonic() - sent)
            return int(relay.json("--status")["spool"]["messages"]) >= 99990
        wait(is_loaded, "the queue", 120)
        took = time.monotonic() - began
        self.assertLess(slowest, 5.0)
        assert relay.process is not None
        with open("/proc/%d/status" % relay.process.pid) as file:
            kilobytes = int(re.search(r"VmRSS:\s+(\d+)", file.read()).group(1))       # type: ignore[union-attr]
        print("a hundred thousand: read in %.0f s, a message taken meanwhile in %.2f s, %d K of memory" % (
            took, slowest, kilobytes), file=sys.stderr)
        self.assertLess(kilobytes, 400000)


class Steady(Ledgers):
    @long_run
    def test_a_minute_of_trouble_leaves_memory_and_descriptors_as_they_were(self) -> None:
        chance = random.Random(1)
        words = ["250 2.1.5 ok"] * 20 + ["450 4.2.0 Greylisted", "421 4.3.2 busy", "450 4.7.1 later"]
        primary = Taker(RCPT=lambda argument: chance.choice(words))
        self.addCleanup(primary.__exit__)
        primary.start()
        relay = self.relay(primary, relay="max_connections_per_client = 0",
                           domain="retry_interval = 1s\nmax_retry_interval = 2s")
        senders = Senders(relay, 6, pause_s=0.02)
        assert relay.process is not None
        process = relay.process.pid

        def sizes() -> Tuple[int, int, int]:
            with open("/proc/%d/status" % process) as file:
                text = file.read()
            numbers = [int(re.search(name + r":\s+(\d+)", text).group(1)) for name in ("VmRSS", "Threads")]   # type: ignore[union-attr]
            return numbers[0], len(os.listdir("/proc/%d/fd" % process)), numbers[1]
        samples = []
        end = time.monotonic() + 60
        while time.monotonic() < end:
            senders.is_over.wait(chance.uniform(0.5, 2.0))
            primary.stop() if primary.is_up else primary.start()
            samples.append(sizes())
        ledger = senders.stop()
        if not primary.is_up:
            primary.start()
        self.compare(primary, relay, ledger)
        early, late = max(samples[len(samples) // 4:len(samples) // 2]), max(samples[-len(samples) // 4:])
        print("steady: %d messages; kilobytes, descriptors, threads: %s then %s" % (len(ledger), early, late), file=sys.stderr)
        self.assertLess(late[0], early[0] * 1.25 + 4000)
        self.assertLess(max(one[1] for one in samples[-len(samples) // 4:]), max(one[1] for one in samples) + 1)
        wait(lambda: sizes()[1] <= min(one[1] for one in samples) + 8, "descriptors to be closed")


# == 15. BENCH =================================================================
# `--bench`: how fast and how light, on this machine, without Postfix.  Nothing
# here is a test: figures depend on the machine and on what else it does.

BARS = 36                       # columns of the widest bar
HARD_S = 300.0                  # for one measurement; a relay that hangs must not hang the bench


class Sender:
    """Sessions that hand over messages as fast as they are taken, from one thread."""

    def __init__(self, port: int, count: int, sessions: int, size: int) -> None:
        self.left = count
        self.latencies: List[float] = []        # seconds from the end of data to its 250
        self.body = (b"Subject: bench\r\n\r\n" + (b"x" * 70 + b"\r\n") * (size // 72 + 1))[:max(20, size - 5)] + b"\r\n.\r\n"
        self.selector = selectors.DefaultSelector()
        self.began = time.monotonic()
        for _ in range(sessions):
            sock = socket.create_connection(("127.0.0.1", port), DEADLINE_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.selector.register(sock, selectors.EVENT_READ, self._session(sock))

    def run(self) -> float:
        """Returns messages a second, from the first connection to the last 250."""
        count = self.left
        for key in list(self.selector.get_map().values()):
            next(key.data)
        while self.selector.get_map():
            for key, _ in self.selector.select(HARD_S):
                try:
                    next(key.data)
                except StopIteration:
                    self.selector.unregister(key.fileobj)
                    key.fileobj.close()         # type: ignore[union-attr]
        return count / (time.monotonic() - self.began)

    def _session(self, sock: socket.socket) -> Iterator[None]:
        def lines(number: int) -> Iterator[None]:
            got = b""
            while got.count(b"\n") < number:
                yield
                got += sock.recv(4096)
            assert got[:1] in b"23", got
        yield from lines(1)
        sock.sendall(b"HELO bench.example\r\n")
        yield from lines(1)
        while self.left > 0:
            self.left -= 1
            sock.sendall(b"MAIL FROM:<a@sender.example>\r\nRCPT TO:<user@%s>\r\nDATA\r\n" % DOMAIN.encode())
            yield from lines(3)
            sock.sendall(self.body)
            began = time.monotonic()
            yield from lines(1)
            self.latencies.append(time.monotonic() - began)


class Sink(threading.Thread):
    """A primary that takes everything, with PIPELINING and, if asked, CHUNKING; counts messages."""

    def __init__(self, listener: socket.socket, chunking: bool) -> None:
        super().__init__(daemon=True)
        self.listener, self.count, self.first = listener, 0, 0.0
        self.extensions = b"250-sink\r\n250-PIPELINING\r\n" + b"250-CHUNKING\r\n" * chunking + b"250 8BITMIME\r\n"
        self.is_over = False

    def run(self) -> None:
        selector = selectors.DefaultSelector()
        self.listener.listen(64)
        selector.register(self.listener, selectors.EVENT_READ)
        while not self.is_over:
            for key, _ in selector.select(0.1):
                if key.fileobj is self.listener:
                    sock = self.listener.accept()[0]
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    sock.sendall(b"220 sink\r\n")
                    talk = self._talk(sock)
                    next(talk)
                    selector.register(sock, selectors.EVENT_READ, talk)
                    continue
                sock = key.fileobj              # type: ignore[assignment]
                data = sock.recv(1 << 18)
                try:
                    key.data.send(data)
                except StopIteration:
                    selector.unregister(sock)
                    sock.close()
        for key in list(selector.get_map().values()):
            key.fileobj.close()                 # type: ignore[union-attr]
        selector.close()

    def _talk(self, sock: socket.socket) -> Iterator[None]:
        data, out = b"", []
        while True:
            while b"\n" not in data:
                sock.sendall(b"".join(out))
                out = []
                more = yield
                if not more:
                    return
                data += more
            line, _, data = data.partition(b"\n")
            verb = line[:4].upper()
            if verb == b"DATA":
                sock.sendall(b"".join(out) + b"354 go\r\n")
                out = []
                while b"\r\n.\r\n" not in data:
                    more = yield
                    if not more:
                        return
                    data += more
                data = data.partition(b"\r\n.\r\n")[2]
            elif verb == b"BDAT":
                size = int(line.split()[1])
                while len(data) < size:
                    more = yield
                    if not more:
                        return
                    data += more
                data = data[size:]
            if verb in (b"DATA", b"BDAT"):
                self.first = self.first or time.monotonic()
                self.count += 1
            out.append(self.extensions if verb == b"EHLO" else b"221 bye\r\n" if verb == b"QUIT" else b"250 ok\r\n")


class Bench:
    """One relay a measurement, in a folder of its own beside the others."""

    def __init__(self, fsync_ms: float, most: int) -> None:
        self.fsync_ms, self.most = fsync_ms, most
        self.folder = tempfile.mkdtemp(prefix="etrn-bench-")
        self.number = 0

    def relay(self, primary: Primary) -> Relay:
        self.number += 1
        folder = os.path.join(self.folder, str(self.number))
        os.mkdir(folder)
        relay = Relay(folder, primary.address, relay="max_connections_per_client = 0\nlog = relay.log\nmax_connections = 2000")
        relay.limits = {"SLOW_MS": self.fsync_ms}
        return relay

    @staticmethod
    def start(relay: Relay) -> float:
        """Returns the seconds until it greets."""
        with contextlib.suppress(OSError):
            os.remove(os.path.join(relay.folder, "relay.log"))
        began = time.monotonic()
        relay.process = subprocess.Popen([sys.executable, "-c", SLOW_STARTER, json.dumps(relay.limits), "--config", relay.file],
                                         stdin=subprocess.DEVNULL)
        relay.reader = threading.Thread()
        text = ""

        def started() -> Any:
            nonlocal text
            with contextlib.suppress(OSError), open(os.path.join(relay.folder, "relay.log"), encoding="utf-8") as log:
                text = log.read(100000)
            return re.search(r"started: .*listening on 127\.0\.0\.1:(\d+)", text)
        relay.port = int(wait(started, "the start").group(1))
        with socket.create_connection(("127.0.0.1", relay.port), DEADLINE_S) as sock:
            sock.recv(100)
        return time.monotonic() - began

    @staticmethod
    def stop(relay: Relay) -> None:
        assert relay.process is not None
        relay.process.terminate()
        relay.process.wait(30)

    def accept(self, relay: Relay, count: int, sessions: int = 50, size: int = 4096) -> List[float]:
        cpu = processor_s(relay)
        sender = Sender(relay.port, count, sessions, size)
        rate = sender.run()
        cost = (processor_s(relay) - cpu) / count * 1000
        times = sorted(sender.latencies)
        row("accept, %d sessions, %d KB" % (sessions, size // 1024), "%.0f msg/s" % rate, "%.2f ms" % cost,
            "250 after %.0f ms, p99 %.0f ms" % (times[len(times) // 2] * 1000, times[len(times) * 99 // 100] * 1000),
            "%.0f MB" % resident_mb(relay))
        return times

    def drain(self, relay: Relay, primary: Primary, count: int, chunking: bool) -> None:
        sink = Sink(primary.sock, chunking)
        cpu = processor_s(relay)
        sink.start()
        with relay.client() as client:
            client.say("ETRN " + DOMAIN)
        began = time.monotonic()
        wait(lambda: sink.count >= count, "the queue to be drained", HARD_S)
        took = time.monotonic() - began
        row("drain%s" % (", CHUNKING" if chunking else ""), "%.0f msg/s" % (count / took),
            "%.2f ms" % ((processor_s(relay) - cpu) / count * 1000), "first after %.0f ms" % ((sink.first - began) * 1000),
            "%.0f MB" % resident_mb(relay))
        sink.is_over = True
        sink.join()

    def throughput(self) -> None:
        count = 3000 if not self.fsync_ms else 1500
        for chunking in (False, True):
            with Primary() as primary:
                relay = self.relay(primary)
                self.start(relay)
                times = self.accept(relay, count)
                if not chunking:
                    histogram(times)
                self.drain(relay, primary, count, chunking)
                self.stop(relay)

    def weight(self) -> None:
        """Memory of idle clients, and of large messages at once."""
        with Primary() as primary:
            relay = self.relay(primary)
            self.start(relay)
            before = resident_mb(relay)
            row("idle", "", "", "", "%.0f MB" % before)
            with contextlib.ExitStack() as stack:
                for _ in range(1000):
                    sock = stack.enter_context(socket.create_connection(("127.0.0.1", relay.port), DEADLINE_S))
                    sock.recv(100)
                row("1,000 idle connections", "", "", "", "%+.0f MB" % (resident_mb(relay) - before))
            before = resident_mb(relay)
            Sender(relay.port, 20, 20, 40 << 20).run()
            row("20 messages of 40 MB at once", "", "", "", "%+.0f MB" % (resident_mb(relay) - before))
            self.stop(relay)

    def scale(self) -> None:
        """What a message costs as the queue grows."""
        for size in (1000, 10000, 100000):
            if size <= self.most:
                with Primary() as primary:
                    self.grown(self.relay(primary), primary, size)

    def grown(self, relay: Relay, primary: Primary, size: int) -> None:
        self.start(relay)
        before = resident_mb(relay)
        self.stop(relay)
        for number in range(size):
            fill(relay.spool, 0xABC0000000 + number)
        greeting = self.start(relay)
        wait(lambda: self.loaded(relay) >= size, "the queue to be read", HARD_S)
        row("%d messages queued" % size, "", "", "greets after %.1f s" % greeting,
            "%.1f KB each" % ((resident_mb(relay) - before) * 1024 / size))
        self.accept(relay, 1000)
        began = time.monotonic()
        relay.run("--queue", DOMAIN)
        row("--queue %s" % DOMAIN, "", "", "%.1f s" % (time.monotonic() - began), "")
        self.drain(relay, primary, size + 1000, False)
        self.stop(relay)

    @staticmethod
    def loaded(relay: Relay) -> int:
        return int(relay.json("--status")["spool"]["messages"])

    def run(self) -> None:
        try:
            row("", "rate", "processor", "time", "memory")
            self.throughput()
            if not self.fsync_ms:
                self.weight()
                self.scale()
        finally:
            shutil.rmtree(self.folder, True)


# Each fsync takes so many milliseconds longer: what a slow card makes of it.
SLOW_STARTER = ("import json, os, sys, time; sys.path.insert(0, %r); import etrn_relay; "
                "slow, real = json.loads(sys.argv[1])['SLOW_MS'] / 1000, os.fsync; "
                "os.fsync = (lambda fd: (time.sleep(slow), real(fd))[1]) if slow else real; "
                "sys.exit(etrn_relay.main(sys.argv[2:]))" % HERE)


def fill(spool: str, number: int) -> None:
    """One queued pair, as the relay would have written it, but not synced."""
    id = "%X" % number
    data = b"Received: by backup.example.net; Tue, 1 Jan 2030 00:00:00 +0000\r\nSubject: bench\r\n\r\n" + b"x" * 1000 + b"\r\n"
    sidecar = sidecar_of(id)
    sidecar["size"], sidecar["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    for kind, octets in ((".eml", data), (".json", etrn.format_sidecar(sidecar))):
        with open(os.path.join(spool, id + kind), "wb") as file:
            file.write(octets)


def processor_s(relay: Relay) -> float:
    """Seconds of processor time the relay has used, where /proc tells."""
    assert relay.process is not None
    try:
        with open("/proc/%d/stat" % relay.process.pid, encoding="ascii") as file:
            words = file.read().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return float("nan")


def resident_mb(relay: Relay) -> float:
    assert relay.process is not None
    try:
        with open("/proc/%d/statm" % relay.process.pid, encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
    except OSError:
        return float("nan")


def row(what: str, rate: str, cost: str, times: str, memory: str) -> None:
    print(("%-32s %12s %10s  %-28s %12s" % (what, rate, cost, times, memory)).rstrip(), flush=True)


def histogram(times: Sequence[float]) -> None:
    """Of the time to 250, in steps that double."""
    counts: Dict[int, int] = collections.Counter(max(0, int(seconds * 1000)).bit_length() for seconds in times)
    for step in range(min(counts), max(counts) + 1):
        bar = "#" * -(-counts[step] * BARS // max(counts.values())) if counts[step] else ""
        print("    under %6d ms  %-*s %d" % (1 << step, BARS, bar, counts[step]))


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
        return "".join("\nat the %s %.1500r\n" % (name, getattr(test, name)) for name in ("row", "state") if hasattr(test, name))


def run_tests(given: argparse.Namespace) -> Tuple[int, int, int]:
    """Numbers of tests that passed, failed and were skipped."""
    everything = unittest.TestLoader().loadTestsFromModule(sys.modules[__name__])
    wanted = given.k.replace(" ", "_").lower()
    chosen = [test for group in everything for test in group if wanted in test.id().lower()
              and (given.long or not hasattr(getattr(test, test.id().rpartition(".")[2]), "is_long"))]
    part, parts = map(int, given.part.split("/"))
    runner = unittest.TextTestRunner(stream=sys.stdout, verbosity=2 if given.v else 1, resultclass=Result)
    result = runner.run(unittest.TestSuite(chosen[part::parts]))
    failed = {test.id() for test, _ in result.failures + result.errors} | {test.id() for test in result.unexpectedSuccesses}
    skipped = {test.id() for test, _ in result.skipped} - failed
    return max(0, result.testsRun - len(failed) - len(skipped)), len(failed), len(skipped)


def run_parts(arguments: Sequence[str], parts: int) -> Tuple[int, int, int]:
    """The same in several processes: most tests wait for something most of their time."""
    sums = [0, 0, 0]
    command = [sys.executable, os.path.abspath(__file__), *arguments]
    workers = [subprocess.Popen([*command, "--part", "%d/%d" % (part, parts)], stdout=subprocess.PIPE) for part in range(parts)]
    for worker in workers:
        text = worker.communicate()[0].decode("utf-8", "replace")
        match = re.search(r"(\d+) passed, (\d+) failed, (\d+) skipped\n\Z", text)
        print(text[:match.start()] if match else text, end="")
        counts = map(int, match.groups()) if match else (0, 1, 0)       # it died
        sums = [one + other for one, other in zip(sums, counts)]
    return sums[0], sums[1], sums[2]


def main() -> int:
    parser = argparse.ArgumentParser(description="Tests of etrn_relay.py.")
    parser.add_argument("-k", metavar="PATTERN", default="", help="only tests whose name contains PATTERN")
    parser.add_argument("-v", action="store_true", help="name each test")
    parser.add_argument("-j", metavar="N", type=int, default=4, help="in so many processes [4]")
    parser.add_argument("--long", action="store_true", help="also the tests that take minutes")
    parser.add_argument("--part", metavar="K/N", help="only every Nth test, from the Kth on; in this process")
    parser.add_argument("--bench", action="store_true", help="measure speed and memory instead of testing")
    parser.add_argument("--fsync-ms", metavar="MS", type=float, default=0.0, help="--bench on a disk that is so slow [as it is]")
    parser.add_argument("--most", metavar="N", type=int, default=10000, help="--bench with up to so many queued [10000]")
    given = parser.parse_args()
    if given.bench:
        Bench(given.fsync_ms, given.most).run()
        return 0
    if given.part is None:
        # The relay is started a hundred times; it need not be compiled each time.
        with tempfile.TemporaryDirectory(prefix="etrn-test-") as cache:
            os.environ["PYTHONPYCACHEPREFIX"] = cache
            os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
            counts = run_parts(["-v"] * given.v + ["--long"] * given.long + ["-k", given.k], given.j if not given.k else 1)
    else:
        counts = run_tests(given)
    print("%d passed, %d failed, %d skipped" % counts)
    return 1 if counts[1] else 0


if __name__ == "__main__":
    sys.exit(main())
