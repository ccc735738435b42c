#!/usr/bin/env python3
"""Tests of etrn_relay.py.

    python3 test_etrn_relay.py [-k PATTERN] [-v] [-j N] [--long]
    python3 test_etrn_relay.py --bench [--fsync-ms MS] [--most N]

Nothing but the standard library, loopback and temporary folders is used, and
every port is one the system gave.  The last line says `N passed, N failed,
N skipped`; the exit status is 0 when none failed.

CONTENTS  1 HARNESS  2 GRAMMAR  3 CONFIG  4 SESSION  5 SMUGGLING  6 SPOOL
          7 PROOF  8 SCHEDULE  9 DELIVERY  10 DNS  11 DSN  12 RELAY  13 COMMANDS
          14 LAYERS  15 BENCH
"""
import argparse
import ast
import asyncio
import base64
import bisect
import collections
import concurrent.futures
import contextlib
import copy
import ctypes
import email
import email.policy
import email.utils
import errno
import fcntl
import functools
import hashlib
import heapq
import hmac
import html
import http.client
import io
import ipaddress
import itertools
import json
import mailbox
import mmap
import multiprocessing
import os
import plistlib
import pathlib
import platform
import pwd
import random
import re
import select
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import unittest
import warnings
from unittest import mock

import etrn_relay as etrn

HERE = os.path.dirname(os.path.abspath(__file__))
SOURCE = os.path.join(HERE, "etrn_relay.py")
SAMPLE = os.path.join(HERE, "etrn.conf.sample")

# == 1. HARNESS ================================================================
# Clocks, failing disks, scripted primaries and nameservers, and the relay as a
# process.  No test sleeps for luck: wait() polls until something is so.

LONG = float(os.environ.get("ETRN_RELAY_LONG", "1"))    # so many times longer the fuzz runs
DEADLINE_S = 20.0               # for anything waited for; reached only by a failing test
DOMAIN = "ourdom.example"
MESSAGE = b"From: <a@sender.example>\r\nSubject: one\r\n\r\nHello.\r\n"


def wait(is_so, what="", seconds=DEADLINE_S):
    """The first true value of `is_so()`; fails when it never comes."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = is_so()
        if value:
            return value
        time.sleep(0.005)
    raise AssertionError("waited in vain for %s" % (what or is_so))


def enter(test, context):
    """What `with` would give; it ends with the test."""
    value = context.__enter__()
    test.addCleanup(context.__exit__, None, None, None)
    return value


def unused_port():
    """For a program that will bind it later, and again after a stop.  Below the ports that
    the system gives to whoever asks for any: what connects meanwhile does not get it."""
    while True:
        port = random.randrange(10000, 32768)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", port))
            return port


def config(text="", domain="", file="/nowhere/etrn.conf"):
    """A small configuration: lines for [relay], lines for [domain ourdom.example] and what follows it."""
    return etrn.parse_config("[relay]\nhostname = backup.example.net\n%s\n[domain %s]\n%s\n" % (text,
        DOMAIN, domain), file)


def load(path):
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def save(path, text):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    return path


class Folder(unittest.TestCase):
    """Test cases with a temporary folder of their own."""

    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="etrn-test-")
        self.addCleanup(shutil.rmtree, self.folder, True)

    def path(self, name):
        return os.path.join(self.folder, name)

    def inner(self):
        """A new folder in it."""
        return tempfile.mkdtemp(dir=self.folder)


def long_run(test):
    """Minutes, not seconds: runs with --long only."""
    test.is_long = True
    return test


def shorten(**seconds):
    """Other values for constants of section 2, so that no test waits for a real timeout."""
    return mock.patch.multiple(etrn, **seconds)


# -- scripted primaries

HANG, CUT = object(), object()          # answers: never, or the connection closed


def smtp(stage, say, hear, take, more=()):
    """The server's side of SMTP.  Yields None for a line, a number for so many octets, a float for a pause,
    "TLS" for a handshake, "QUIT" at the end; is sent what came.  `say(verb, argument, default)` returns the
    first digit of what it said; what it is given besides is done before a 2xx leaves: who reads it may look.
    Verb "none": what is out of order."""
    sender = None
    recipients = []
    while True:
        line = (yield None).rstrip(b"\r\n").decode("utf-8")
        hear(line)
        verb, _, argument = line.partition(" ")
        verb, path = verb.upper(), argument.partition("<")[2].partition(">")[0]
        parts = [(yield int(argument.split()[0]))] if verb == "BDAT" else []
        if verb == "MAIL" and sender is None:
            yield getattr(stage, "pace_s", 0.1)
            if say(verb, argument, "250 2.1.0 ok") == "2":
                sender, recipients = path, []
        elif verb == "RCPT" and sender is not None:
            recipients += [path] * (say(verb, argument, "250 2.1.5 ok") == "2")
        elif verb in ("MAIL", "RCPT"):
            say("none", argument, "503 5.5.1 nested MAIL" if sender is not None else "503 5.5.1 no MAIL")
        elif verb in ("DATA", "BDAT") and not recipients:
            say("none", argument, "554 5.5.1 no valid recipients")
        elif verb == "BDAT" or (verb == "DATA" and say(verb, argument, "354 go on") == "3"):
            while verb == "DATA":
                one = yield None
                if one == b".\r\n":
                    break
                parts.append(one[1:] if one.startswith(b".") else one)
            yield 0.01
            data = b"".join(parts)
            take(data)
            keep = functools.partial(stage.messages.append, (sender, recipients, data))
            if say(".", argument, "250 2.0.0 taken", keep) == "2" or verb == "DATA":
                sender, recipients = None, []
        elif verb == "RSET":
            sender, recipients = None, []
            say(verb, argument, "250 2.0.0 ok")
        elif verb == "EHLO":
            first = ["250-" + one for one in ("primary.example", *stage.extensions, *more)]
            say(verb, argument, "\n".join([*first[:-1], first[-1].replace("-", " ", 1)]))
        elif verb == "QUIT":
            say(verb, argument, "221 2.0.0 bye")
            yield "QUIT"
        elif verb != "DATA":
            usual = "250 2.0.0 ok" if verb in ("HELO", "NOOP", ".") else "500 5.5.2 what?"
            if say(verb, argument, "220 2.0.0 go" if verb in more else usual) == "2" and verb in more:
                yield "TLS"


EXTENSIONS = "PIPELINING", "8BITMIME", "SMTPUTF8", "DSN", "SIZE 1000000"


class Primary:
    """A scripted SMTP server.  `script` maps a verb ("greeting", "EHLO", "MAIL",
    "RCPT", "DATA", "." for the end of data, ...) to what it says: a text, raw
    bytes, HANG, CUT, a list (one for each use, the last one again and again)
    or a function of the argument that returns one of these.

    It is created down, on a port that stays its own; start() and stop() may
    follow each other.  `messages` are (sender, recipients, data) as accepted."""

    def __init__(self, where=("127.0.0.1", 0), extensions=EXTENSIONS, **script):
        self.script = dict(script)
        self.extensions = extensions
        self.messages = []
        self.log = []        # commands as they came
        self.uses = collections.Counter()
        self.clients = []
        self.threads = []
        self.host, self.port = where
        self.sock = self._bind()
        self.is_up = False

    def _bind(self):
        """Bound but not listening, a port refuses connections and stays ours."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((self.host, self.port))
        self.port = sock.getsockname()[1]
        return sock

    @property
    def address(self):
        return "%s:%d" % (self.host, self.port)

    def start(self):
        self.sock.listen(64)
        self.is_up = True
        self._spawn(self._accept, self.sock)
        return self

    def stop(self):
        """As abruptly as a power cut."""
        self._end()
        last, self.sock = self.sock, self._bind()      # before it is let go: nobody else gets it
        last.close()

    def _end(self):
        self.is_up = False
        for sock in [self.sock, *self.clients]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(DEADLINE_S)
        self.clients, self.threads = [], []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._end()
        self.sock.close()

    def _spawn(self, target, *arguments):
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self.threads.append(thread)
        thread.start()

    def _accept(self, listener):
        while self.is_up:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.clients.append(sock)
            self._spawn(self._serve, sock)

    def _serve(self, sock):
        with contextlib.suppress(OSError, ValueError), sock:       # cut by the script, stop() or the client
            self._say(sock, "greeting", "", "220 primary.example ESMTP")
            self._talk(sock)

    def _said(self, verb, argument, default):
        said = self.script.get(verb, default)
        if isinstance(said, list):
            said = said[min(self.uses[verb], len(said) - 1)]
        self.uses[verb] += 1
        if callable(said):
            said = said(argument)
        return default if said is None else said

    def _say(self, sock, verb, argument, default, taken=lambda: None):
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

    def on_data(self, sock, data):
        """A whole message is here; its answer comes next."""

    def _talk(self, sock, more=()):
        """Whether TLS is to begin."""
        talk = smtp(self, functools.partial(self._say, sock), self.log.append,
                    functools.partial(self.on_data, sock), more)
        want = next(talk)
        with sock.makefile("rb") as lines:
            while want not in ("TLS", "QUIT"):
                octets = lines.readline() if want is None else lines.read(want) if type(want) is int else b""
                if want is None and not octets:
                    return False        # it broke off
                want = talk.send(octets)
        return bool(want == "TLS")


# -- scripted nameservers

def wire_name(name):
    return b"".join(bytes([len(label)]) + label.encode("ascii") for label in name.split(".") if label) + b"\0"


def record(owner, kind, data):
    """One resource record; data as etrn_relay shows it, an alias as text."""
    if not isinstance(data, bytes):
        if kind in (etrn.A, etrn.AAAA):
            data = socket.inet_pton(socket.AF_INET6 if kind == etrn.AAAA else socket.AF_INET, data)
        else:
            data = struct.pack("!H", data[0]) + wire_name(data[1]) if kind == etrn.MX else wire_name(data)
    return wire_name(owner) + struct.pack("!HHIH", kind, 1, 60, len(data)) + data


def dns_answer(id, name, kind, records=(), rcode=0, flags=0x8180):
    return (struct.pack("!HHHHHH", id, flags | rcode, 1, len(records), 0, 0) + wire_name(name)
            + struct.pack("!HH", kind, 1) + b"".join(records))


class Dns:
    """A scripted nameserver, UDP and TCP on one port.  `zone` maps (name, kind)
    to records; a name in no key does not exist.  `truncate` sends UDP clients
    to TCP, `mangle` changes each UDP answer (or returns None: silence)."""

    def __init__(self, zone, truncate=False, rcode=0, mangle=lambda packet: packet, address="127.0.0.1",
                 port=0):
        self.zone, self.truncate, self.rcode, self.mangle = zone, truncate, rcode, mangle
        self.asked = []     # (udp or tcp, name, kind)
        while True:
            self.tcp, self.udp = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self.tcp.bind((address, port))
            self.port = self.tcp.getsockname()[1]
            try:
                self.udp.bind((address, self.port))
                break
            except OSError:             # somebody else has that port for UDP
                self.tcp.close()
                self.udp.close()
        self.tcp.listen(8)
        self.ended, self.end = socket.socketpair()
        self.thread = threading.Thread(target=self._run, daemon=True)

    @property
    def endpoint(self):
        return etrn.Endpoint("127.0.0.1", self.port)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.end.close()
        self.thread.join(DEADLINE_S)
        for sock in (self.tcp, self.udp, self.ended):
            sock.close()

    def _run(self):
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

    def _reply(self, packet, how):
        id, = struct.unpack("!H", packet[:2])
        name, at = etrn.parse_name(packet, 12)
        kind, = struct.unpack("!H", packet[at:at + 2])
        self.asked.append((how, name, kind))
        if self.rcode:
            return dns_answer(id, name, kind, rcode=self.rcode)
        if self.truncate and how == "udp":
            return dns_answer(id, name, kind, flags=0x8380)
        if (name, etrn.CNAME) in self.zone:             # the alias alone: the rest is left to who asked
            return dns_answer(id, name, kind, [record(name, etrn.CNAME, self.zone[name, etrn.CNAME][0])])
        if not any(known == name for known, _ in self.zone):
            return dns_answer(id, name, kind, rcode=etrn.NXDOMAIN)
        return dns_answer(id, name, kind, [record(name, kind, data)
                                           for data in self.zone.get((name, kind), [])])


# -- a client of the relay, octet for octet

def connect(port, source="127.0.0.1"):
    return socket.create_connection(("127.0.0.1", port), DEADLINE_S, (source, 0))


class Wire:
    """An SMTP client that says exactly what it is told to."""

    def __init__(self, port, source="127.0.0.1"):
        self.sock = connect(port, source)
        self.lines = self.sock.makefile("rb")
        self.greeting = self.reply()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.lines.close()
        self.sock.close()

    def reply(self):
        """All lines of a reply; empty when the relay has closed the connection."""
        out = []
        while True:
            line = self.lines.readline().decode("utf-8")
            out.append(line.rstrip("\r\n"))
            if line[3:4] != "-":
                return "\n".join(out)

    def say(self, *commands):
        """Send commands, one after the other; returns the last one's reply."""
        reply = ""
        for command in commands:
            self.sock.sendall(command.encode("utf-8") + b"\r\n")
            reply = self.reply()
        return reply

    def raw(self, data):
        self.sock.sendall(data)

    def send(self, data, sender="a@sender.example", recipients=("user@" + DOMAIN,), parameters=""):
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
hostname = %(hostname)s
listen = %(listen)s
min_free_space = %(min_free_space)s
nameservers = %(nameservers)s
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
USUAL = {"hostname": "backup.example.net", "listen": "127.0.0.1:0", "min_free_space": "0", "smarthost": "mx",
         "nameservers": "127.0.0.1:9", "relay": "", "bounces": "", "domain": ""}
# Pauses that serve real outages would make tests slow; how long they are is tested with a clock of our own.
QUICK = {"PROBE_FIRST_S": 0.05, "TRIGGER_S": 0.05, "RETRY_DISK_S": 0.2}
STARTER = ("import json, sys; sys.path.insert(0, %r); import etrn_relay; "
           "vars(etrn_relay).update(json.loads(sys.argv[1])); del sys.argv[1]; etrn_relay.run_main()" % HERE)


def python(begin=""):
    """The relay as a script would be, without compiling it each time; `begin` is done before.
    -S: the standard library alone; other packages of this Python only make each start slow."""
    return [sys.executable, "-S", "-c", begin + STARTER]


class Relay:
    """etrn_relay.py as a process, in a folder of its own.  start() may follow end().
    Options: values for CONFIG, and for constants of section 2; `begin` of python()."""

    def __init__(self, folder, primary="127.0.0.1:9", begin="", **options):
        self.folder, self.begin = folder, begin
        self.file = os.path.join(folder, "etrn.conf")
        self.spool = os.path.join(folder, "spool")
        self.values = {name: options.pop(name, usual) for name, usual in USUAL.items()}
        self.limits = dict(QUICK, **options)
        self.write_config(primary=primary)
        self.log = []
        self.port = 0
        self.process = None

    def write_config(self, **values):
        self.values.update(values)
        save(self.file, CONFIG % self.values)

    def start(self):
        process = subprocess.Popen([*python(self.begin), json.dumps(self.limits), "--config", self.file],
                                   stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
        self.process, since = process, len(self.log)
        self.reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        self.reader.start()
        self.port = int(self.logged(r"started: .*listening on 127\.0\.0\.1:(\d+)", since).group(1))
        return self

    def _read(self, process):
        assert process.stderr is not None
        with process.stderr as lines:
            for line in lines:
                self.log.append(line.decode("utf-8", "replace").rstrip("\n"))

    def logged(self, pattern, since=0):
        """The match of the first line of the log that has one."""
        def look():
            found = next(filter(None, (re.search(pattern, line) for line in self.log[since:])), None)
            is_dead = self.process is not None and self.process.poll() is not None
            if found is None and is_dead and not self.reader.is_alive():
                raise AssertionError("the relay ended: %s" % "\n".join(self.log[-20:]))
            return found
        return wait(look, "a log line like %r in\n%s" % (pattern, "\n".join(self.log[-20:])))

    def end(self, number=signal.SIGTERM):
        """Stop it with a signal; returns its exit status."""
        self.signal(number)
        status = self.process.wait(DEADLINE_S)
        self.reader.join(DEADLINE_S)
        return status

    def signal(self, number):
        assert self.process is not None
        self.process.send_signal(number)

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        if self.process is not None and self.process.poll() is None:
            self.end(signal.SIGKILL)

    def client(self, hello="EHLO client.example"):
        wire = Wire(self.port)
        wire.say(hello)
        return wire

    def send(self, data=MESSAGE, **envelope):
        with self.client() as wire:
            return wire.send(data, **envelope)

    def run(self, *arguments):
        return run("--config", self.file, *arguments)

    def command(self, line, **options):
        """The same in a process of its own."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return subprocess.run([*python(self.begin), "{}", "--config", self.file, *line.split()], **options)

    def json(self, *arguments):
        return json.loads(self.run(*arguments, "--json")[1])

    def queue(self):
        return self.json("--queue")

    def read_spool(self):
        """Returns once it has; until then it refuses or waits with what would do harm."""
        self.queue()

    def files(self):
        return spool_files(self.spool)

    def is_empty(self):
        return not self.files()

    def until_empty(self, hint=""):
        wait(self.is_empty, "an empty spool " + hint)

    def at(self, *names):
        """A path in its spool."""
        return os.path.join(self.spool, *names)


def spool_files(folder):
    """Names of the queued pairs, without what else a spool holds."""
    return sorted(name for name in os.listdir(folder) if re.fullmatch(r"[0-9A-F]{6,20}\.(eml|json)", name))


def run(*arguments):
    """The command line in this process: exit status, output, errors."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with mock.patch.multiple(sys, stdin=io.StringIO(), stdout=out, stderr=err):
        code = etrn.main(arguments)
    return (code, *(stream.buffer.getvalue().decode("utf-8") for stream in (out, err)))


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
# A key that asks for a passphrase, and that none opens.
LOCKED_KEY = PEMS["one.key"].replace(
    "KEY-----\n", "KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,%032d\n\n" % 0, 1)


# -- tests

def cases(test, table):
    """Rows of a table; a failure names the row it happened at, and an empty table is one."""
    rows = list(table)
    test.assertTrue(rows)
    for row in rows:
        test.row = row
        yield row
    del test.row


class Relays(Folder):
    """Tests with relays as processes, and primaries for them."""

    def primary(self, *kind, **script):
        """A primary that is down; of another class than Primary, if given, with the arguments for it."""
        return enter(self, kind[0](*kind[1:], **script) if kind else Primary(**script))

    def relay(self, primary=None, **options):
        """A running relay."""
        target = primary.address if isinstance(primary, Primary) else primary or self.primary().address
        return enter(self, Relay(self.inner(), target, **options))

    def reload(self, running, *expected, **values):
        """SIGHUP with another configuration, until the log has said all that is expected."""
        running.write_config(**values)
        since = len(running.log)
        running.signal(signal.SIGHUP)
        for one in expected:
            running.logged(one, since)

    def rcpt(self, relay, *users, sender="a@sender.example"):
        """Code and status for each."""
        with relay.client() as client:
            client.say("MAIL FROM:<%s>" % sender)
            addresses = [one if "@" in one else one + "@" + DOMAIN for one in users]
            return [client.say("RCPT TO:<%s>" % address)[:9] for address in addresses]

    def let_in(self, relay, most):
        """Of more clients so many are greeted and served; those of before may not have left yet."""
        def count():
            with contextlib.ExitStack() as stack:
                wires = [stack.enter_context(Wire(relay.port)) for _ in range(most + 2)]
                replies = [wire.say("NOOP") if wire.greeting[:3] == "220" else wire.reply() for wire in wires]
                self.assertEqual({wire.greeting[:3] for wire in wires}, {"220", "421"})
                return replies.count("250 2.0.0 Ok") if replies.count("") >= 2 else 0
        wait(lambda: count() == most, "%d to be let in" % most)

    def connected(self, port, count):
        socks = [connect(port) for _ in range(count)]
        for sock in socks:
            self.addCleanup(sock.close)
        return socks

    def opened(self, relay, count):
        """Connections that were greeted."""
        socks = self.connected(relay.port, count)
        for sock in socks:
            with sock.makefile("rb", 0) as lines:
                self.assertRegex(lines.readline(), rb"\A220 [^\r]+\r\n\Z")
        return socks

    def kept(self, relay):
        """Files of messages, once nobody is connected and nothing is half kept."""
        wait(lambda: relay.json("--status")["connections"] == 0, "all to be gone")
        wait(lambda: not os.listdir(relay.at("incoming")), "nothing to be half kept")
        self.no_bugs(relay.log)
        return len(relay.files())

    def no_bugs(self, log):
        self.assertEqual([line for line in log if "bug: " in line], [])


# == 2. GRAMMAR ================================================================

class Grammar(unittest.TestCase):
    """Text from outside becomes a value, or is refused with its reason; values become text."""

    def test_domains_become_lower_case_a_labels(self):
        for text, name in cases(self, [
                ("Example.COM", "example.com"), ("a", "a"), ("x-1.example", "x-1.example"),
                ("1.2.example", "1.2.example"), ("_dmarc.example", "_dmarc.example"),
                ("münchen.example", "xn--mnchen-3ya.example"),
                # A-labels are never decoded to judge them
                *((name, name) for name in ("xn--mnchen-3ya.example", "xn--fa-hia.test", "xn--0.test")),
                ("XN--STRAE-OQA.example.", "xn--strae-oqa.example"),
                ("a" * 63 + ".example", "a" * 63 + ".example"),
                # what IDNA 2003 and 2008 encode differently is encoded by 2008
                ("straße.example", "xn--strae-oqa.example"), ("STRAßE.example", "xn--strae-oqa.example"),
                ("faß.test", "xn--fa-hia.test"), ("ς.example", "xn--3xa.example"),
                ("ΟΔΟΣ.example", "xn--pxavbq.example"),     # no final sigma, though lower() makes one
                ("نامه\u200cای.com", "xn--mgba3gch31f060k.com"),
                ("e\u0301ß.example", "xn--zcat.example")]):
            self.assertEqual(etrn.parse_domain(text), name)

    def test_what_is_no_domain_is_refused(self):
        for text in cases(self, [
                "", ".", "..", "a..", "a..b", ".a", "-a.example", "a-.example", "a" * 64 + ".example",
                "a." * 127 + "aa", "a b", "a\0b", "a\tb", "192.0.2.1", "192.0.2.1.", "a.1", "*", "@", "#q",
                "../x", "%2e", "a/b", "xn---", "xn--a-ecp.ru\n", "x\n", "a" * 10000, "ü" * 5000,
                "\u202eb.example", "[192.0.2.1]", "\udcff.example",
                "\u200d.example", "ß b.example", "ß\u202e.example", "ß" * 63 + ".example", "ß\0.example",
                # an ASCII name in disguise
                "our\u00addom.example", "\uff4furdom.example", "\u24deurdom.example",
                "\u200bourdom.example", "ourdom\ufe0f.example", "x.\uff45xample"]):
            self.assertRaises(ValueError, etrn.parse_domain, text)

    def test_paths_are_taken_apart(self):
        """Also such as RFC 5321 forbids and the world sends: they go on as they came."""
        for text, address, domain, rest in cases(self, [
                ("<>", "", "", ""), ("<a@b.example>", "a@b.example", "b.example", ""),
                ("<A@B.Example> SIZE=1", "A@B.Example", "b.example", " SIZE=1"),
                ("<postmaster>", "postmaster", "", ""), ("PostMaster", "PostMaster", "", ""),
                ("<@r1.example,@r2.example:u@d.example>", "u@d.example", "d.example", ""),
                ("<u@[127.0.0.1]>", "u@[127.0.0.1]", "[127.0.0.1]", ""),
                ("<u@[IPv6:::1]>", "u@[IPv6:::1]", "[IPv6:::1]", ""),
                ("<u@D.Example.>", "u@D.Example", "d.example", ""),
                ("a@b.example", "a@b.example", "b.example", ""),
                ("a@B.example. SIZE=10", "a@B.example", "b.example", " SIZE=10"),
                ("a@b.example\tSIZE=10", "a@b.example", "b.example", "\tSIZE=10"),
                ("<a@b.example>\tSIZE=10", "a@b.example", "b.example", "\tSIZE=10"),
                ("<u@MÜNCHEN.example>", "u@MÜNCHEN.example", "xn--mnchen-3ya.example", ""),
                ("<u@XN--Mnchen-3ya.example>", "u@XN--Mnchen-3ya.example", "xn--mnchen-3ya.example", ""),
                ("<u@straße.example>", "u@straße.example", "xn--strae-oqa.example", ""),
                *(("<%s@d.example>" % local, local + "@d.example", "d.example", "") for local in (
                    '"Fred Bloggs"', '""', r'"a\"b"', '"Abc@def"', "a+b", "customer/department=shipping",
                    "!def!xyz%abc", "é", "a..b", ".a", "a.", "../../etc/x", "x" * 1900, "é" * 33))]):
            path, left = etrn.parse_path(text, "5.1.3")
            self.assertEqual((str(path), path.domain, left), (address, domain, rest))

    def test_spellings_of_one_address_have_one_key(self):
        for one, other in cases(self, [
                ("<U@D.example>", "u@d.Example."), ("<u@münchen.example>", "<u@XN--mnchen-3ya.example>"),
                ("<u@faß.example>", "<u@xn--fa-hia.example>")]):
            self.assertEqual(etrn.parse_path(one, "")[0].key, etrn.parse_path(other, "")[0].key)
        self.assertNotEqual(etrn.parse_path("<u@faß.example>", "")[0].key, "u@fass.example")

    def test_xtext_has_its_form(self):
        for text in cases(self, ["abc", "a+2Bb", "QQ314159", "+00"]):
            self.assertEqual(etrn.parse_xtext(text, 100), text)
        self.assertEqual(etrn.parse_xtext("a+2b+3D+3d", 100), "a+2B+3D+3D")     # it goes on in capitals
        for text in cases(self, [None, "", "a b", "a=b", "a+", "a+2", "a+2g", "é", "a\x7f", "x" * 101]):
            self.assertRaises(etrn.Refuse, etrn.parse_xtext, text, 100)
        self.assertEqual(etrn.decode_xtext("a+2Bb+3D"), "a+b=")
        for text, longest, encoded in cases(self, [
                ("a+b=", 99, "a+2Bb+3D"), ("é ", 99, "+C3+A9+20"), ("a+", 3, "a")]):
            self.assertEqual(etrn.encode_xtext(text, longest), encoded)

    def test_parameters_follow_their_rfcs(self):
        for parse, text, value in cases(self, [
                (etrn.parse_parameters, " size=10 SMTPUTF8 X-A=b",
                 {"SIZE": "10", "SMTPUTF8": None, "X-A": "b"}),
                (etrn.parse_parameters, "\tSIZE=1\t \tBODY=7BIT\t", {"SIZE": "1", "BODY": "7BIT"}),
                (etrn.parse_notify, "never", "NEVER"), (etrn.parse_orcpt, "rfc822;a+3db@c", "rfc822;a+3Db@c"),
                (etrn.parse_notify, "SUCCESS,failure", "SUCCESS,FAILURE"),
                (etrn.parse_notify, "DELAY", "DELAY"),
                (etrn.parse_orcpt, "rfc822;a@b.example", "rfc822;a@b.example"),
                (etrn.parse_orcpt, "x400;a+20b", "x400;a+20b"), (etrn.parse_size, "9" * 20, int("9" * 20)),
                (etrn.parse_orcpt, "utf-8;\\x{E9}@b.example", "utf-8;\\x{E9}@b.example")]):
            self.assertEqual(parse(text), value)
        for parse, texts in cases(self, [
                (etrn.parse_parameters, ["SIZE=", "SIZE=1 SIZE=2", "SIZE=1 size=1", "#$%=!@#", "=1",
                 "SIZE = 1", "A==1", "A=\x7f", "SIZE=1\x0bX=1", "SIZE=1\x1fX=1", "SIZE\xa0=1"]),
                (etrn.parse_notify, [None, "", "NEVER,DELAY", "FAILURE,FAILURE", "SOMETIMES", ","]),
                (etrn.parse_orcpt, [None, "", "rfc822", "rfc822;", ";a@b", "rfc 822;a", "rfc822;a b",
                 "rfc822;" + "a" * 501]), (etrn.parse_size, [None, "", "-1", "1K", "9" * 21, "\u0663"])]):
            for text in texts:
                self.assertRaises(etrn.Refuse, parse, text)

    def test_numbers_are_shown_for_people(self):
        for show, value, text in cases(self, [
                (etrn.format_duration, 0, "0s"), (etrn.format_duration, 59, "59s"),
                (etrn.format_duration, 60, "1m"), (etrn.format_duration, 8040, "2h14m"),
                (etrn.format_duration, 86400 * 6 + 3 * 3600 + 5, "6d3h"), (etrn.format_duration, -1, "0s"),
                (etrn.format_duration, 3601, "1h"), (etrn.format_duration, 90.9, "1m30s"),
                (etrn.format_age, 0, "1 second"), (etrn.format_age, 3661, "1 hour and 1 minute"),
                (etrn.format_age, 3 * 86400 + 7500, "3 days and 2 hours"), (etrn.format_age, 86400, "1 day"),
                (etrn.format_size, 0, "0B"), (etrn.format_size, 1023, "1023B"),
                (etrn.format_size, 1024, "1.0K"), (etrn.format_size, 20480, "20K"),
                (etrn.format_size, 52428800, "50M"), (etrn.format_size, 1 << 31, "2.0G"),
                (etrn.format_delay, 0.25, "0.25"), (etrn.format_delay, 123.4, "123"),
                (etrn.format_delay, 1e-9, "0"), (etrn.format_delay, 0.0123, "0.012"),
                (etrn.format_delay, 9.99, "10"), (etrn.format_delay, 604800, "604800"),
                (str, etrn.Endpoint("fe80::1%eth0", 25), "[fe80::1%eth0]:25")]):
            self.assertEqual(show(value), text)

    def test_foreign_text_is_one_printable_line(self):
        for text in cases(self, ["a\r\nb", "a\x1b[2Jb", "\u202e\u2066", "\0", "a\u2028b", "x" * 9999,
                                 "\udcff"]):
            shown = etrn.printable(text)
            self.assertTrue(shown.isprintable() and len(shown.splitlines()) == 1 and len(shown) < 1000, shown)

    def test_clients_are_counted_by_network(self):
        self.assertEqual(etrn.client_network("2001:db8::1"), etrn.client_network("2001:db8::ffff:2"))
        self.assertNotEqual(etrn.client_network("2001:db8::1"), etrn.client_network("2001:db8:0:1::1"))
        self.assertEqual(etrn.client_network("192.0.2.1"), "192.0.2.1")
        self.assertEqual(etrn.client_network("fe80::1%eth0"), etrn.client_network("fe80::2"))
        self.assertEqual(etrn.greylist_network("192.0.2.1"), etrn.greylist_network("192.0.2.254"))


# == 3. CONFIG =================================================================

SAMPLE_HEAD = """\
# etrn.conf - the configuration of etrn_relay.py, a backup mail exchanger.
#
# As it stands this file runs, unprivileged, on loopback: a try-out.  For a
# real backup MX set hostname, listen = 25, spool, user and the domain's name,
# and remove its primary: the MX records name that.
# Durations: 30s 5m 4h 7d 2w.  Sizes: 512K 50M 1G.  Lists: comma or space.
# [defaults] takes the options of [domain example.com], for all domains;
# [domain .example.com] means all subdomains of example.com.
"""
SAMPLE_VALUES = {("relay", "hostname"): "backup.example.net", ("relay", "listen"): "127.0.0.1:2525",
                 ("domain", "primary"): "127.0.0.1:2526"}
SAMPLE_FIRST = {*SAMPLE_VALUES, ("relay", "spool"), ("relay", "user"), ("tls", "certificate"), ("tls", "key"),
                ("status", "listen"), ("status", "token"), ("alerts", "mail")}
SAMPLE_REST = """
# The rest, for which the defaults will do.  Move a line that you change up
# into its section; only [bounces] is not open above.
"""


def format_sample():
    """The text of etrn.conf.sample: every option with its default, the most wanted first.  To write it anew:
    python3 -c 'import test_etrn_relay as t; print(t.format_sample(), end="")' > etrn.conf.sample"""
    out = [SAMPLE_HEAD.rstrip()]
    for mark, is_first in ("", True), ("#", False):
        last = ""
        for place, row in etrn.OPTIONS.items():
            section, name = place
            if (place in SAMPLE_FIRST) == is_first:
                if section != last:
                    out.append("\n%s[%s]" % (mark, "domain example.com" if section == "domain" else section))
                out += textwrap.wrap(row.text, 78, initial_indent="# ", subsequent_indent="# ")
                last, value = section, SAMPLE_VALUES.get(place)
                out.append("%s = %s" % (name, value) if value else "#%s = %s" % (name, row.default or "none"))
        out += [SAMPLE_REST.rstrip()] * is_first
    return "\n".join(out) + "\n"


class Configuration(Folder):
    """What operators write is understood, or told with file and line and what to write instead."""

    def error(self, text):
        with self.assertRaises(etrn.ConfigError) as caught:
            etrn.parse_config(text, "etrn.conf")
        return str(caught.exception)

    FAULTS = r"""
        [relay] | relay_domain = a.example => 2: unknown option 'relay_domain' (did you mean 'domains'?)
        [relay] |  | # x | hostnam = a => 4: unknown option 'hostnam' (did you mean 'hostname'?)
        [domain a.example] | max_mesage_size = 1 => \
2: unknown option 'max_mesage_size' (did you mean 'max_message_size' in [relay]?)
        [relais] => 1: unknown section [relais] (did you mean 'relay'?)
        [Relay] => 1: unknown section [Relay] (did you mean 'relay'?)
        [DEFAULT] | lifetime = 1d => 1: unknown section [DEFAULT] (did you mean 'defaults'?)
        [domain] => 1: unknown section [domain]
        [domains a.example] => 1: unknown section [domains a.example]
        [relay] | [relay] => 2: section [relay] is there twice
        [domain a.example] | [domain A.Example.] => 2: section [domain a.example] is there twice
        [relay] | listen = 25 | listen = 26 => 3: option 'listen' is there twice
        [relay] | LISTEN = 25 | listen = 26 => 3: option 'listen' is there twice
        listen = 25 => 1: an option before the first [section]
        [relay] | listen => 2: not [section], option = value, or comment
        [domain ex ample] => 1: [domain ex ample]: 'ex ample' is not a domain
        [domain *.example] => 1: [domain *.example]: '*.example' is not a domain
        [domain a.example] primary = mx => 1: an option before the first [section]
        [relay] | [domain a.example] x => 2: not [section], option = value, or comment
        [relay] | max_recipients = 0 => 2: max_recipients: '0' is out of range (1 to 50000)
        [relay] | log_level = loud => 2: log_level: 'loud' is not one of: debug, info
        [relay] | listen = 127.0.0.1:70000 => 2: listen: '127.0.0.1:70000' needs a port
        [relay] | listen = => 2: listen: is empty
        [relay] | listen = , => 2: listen: is empty
        [relay] | listen = ::1:25 => 2: listen: '::1:25' may or may not end with a port: write [::1]:25
        [relay] | hostname = a_b c => 2: hostname: 'a_b c' is not a host name
        [relay] | hostname = a\x0bb => 2: hostname: 'a\\x0bb' is not a host name
        [relay] | hostname = |  | max_recipients = => 4: max_recipients: is empty
        [relay] | trusted_clients = 192.0.2.1/24 => 2: trusted_clients:
        [relay] | nameservers = [fe80::1%a b] => 2: nameservers: '[fe80::1%a' is not an address
        [relay] | nameservers = fe80::1%eth0:53 => 2: nameservers: 'fe80::1%eth0:53' may or may not end with
        [relay] | bare_newline = keep => 2: bare_newline: 'keep' is not one of: normalize, reject
        [relay] | domains = a..b => 2: domains: 'a..b' is not a domain
        [status] | listen = 127.0.0.1 => 2: listen: '127.0.0.1' needs a port
        [alerts] | webhook = ftp://x.example/ => 2: webhook: 'ftp://x.example/' is not a web address
        [bounces] | postmaster = me => 2: postmaster: 'me' is not a mail address
        [bounces] | password = x => 2: password needs username beside it
        [tls] | key = x => 2: key needs certificate beside it
        [domain a.example] | primary = [192.0.2.1:25 => 2: primary: '[192.0.2.1:25' is not an address
        [domain a.example] | primary = mx, mail.a.example => 2: primary: 'mx' stands alone
        [domain a.example] | primary = mail.a.example:0 => 2: primary: 'mail.a.example:0' needs a port
        [domain a.example] | etrn = 10.0.0.0/40 => 2: etrn:
        [domain a.example] | recipients = bob => 2: recipients: 'bob' is not a mail address
        [domain a.example] | recipients = file: => 2: recipients: '' is not a path
        [domain a.example] | tls = sha256:abc => 2: tls: 'sha256:abc' is not one of
        [domain a.example] | cutthrough = maybe => 2: cutthrough: 'maybe' is neither yes nor no
        [domain a.example] | max_queue_size = 0 => 2: max_queue_size: '0' is out of range (1B at least)
        [domain a.example] | retry_interval = 1h | max_retry_interval = 1m => 3: max_retry_interval is smaller
        [defaults] | retry_interval = 1h | max_retry_interval = 1m | [domain a.example] => \
3: max_retry_interval is
        [domain A.Example] | lifetime = 1d | username = u => 3: username needs password beside it
        [domain a.example] | password = p => 2: password needs username beside it
        [defaults] | username = u | [domain a.example] => 2: username needs password beside it
        [domain a.example] | username = u | password = p | [domain b.example] | username = u | password = q \
=> 6: this username has another password elsewhere
        """

    NO_VALUES = [
        ("max_recipients", " is not a whole number", ["many", r"\u0663"]),
        ("max_message_size", " is not a size", ["5X", "1.5M", "1KB", r"1\u212a"]),
        ("command_timeout", " is not a duration", ["soon", "5 minutes", "-1", "1e3", r"5\u017f"]),
        ("command_timeout", " is out of range (1s to 1h)", ["2h", "off"]),
        ("listen", " is not an address of this machine", ["mail.example:25", "[fe80::1%eth0]:25"]),
        ("nameservers", " is not an address", ["dns.example", "dns%eth0"]),
        ("nameservers", ": only a link-local address has a zone, like fe80::1%eth0", [
            "2001:db8::1%eth0", "fe80::1%", "192.0.2.1%eth0", "169.254.0.1%eth0", "[fe80::1%a/b]:53"])]

    def test_each_fault_is_told_with_file_and_line(self):
        rows = [row.strip().split(" => ") for row in self.FAULTS.replace("\\\n", "").strip().split("\n")]
        for section, *options in (("relay", "zzz", "file", "lifetime", "postmaster"),
                                  ("domain a.example", "listen", "name")):
            rows += [("[%s] | %s = 25" % (section, option), "2: unknown option '%s'" % option)
                     for option in options]
        for option, why, values in self.NO_VALUES:
            rows += [("[relay] | %s = %s" % (option, value), "2: %s: '%s'%s" % (option, value, why))
                     for value in values]
        for text, expected in cases(self, [*rows, [
                "[domain a.example] | username = " + "u" * 256, "2: username: longer than 255 octets"]]):
            text, expected = (one.encode().decode("unicode_escape") for one in (text, expected))
            error = self.error(text.replace(" | ", "\n"))
            self.assertTrue(error.startswith("etrn.conf:" + expected), error)

    def test_a_fault_is_told_at_its_own_line_wherever_that_is(self):
        for text, line in cases(self, [
                ("[relay]\n\nlisten = 127.0.0.1:25,\n  # more\n\n  [::1]:zz\n", 3),      # where a list begins
                ("[relay]\nlisten =\n  127.0.0.1:25\n  [::1]:25\nzzz = 1\n", 5),          # behind one
                ("[relay]\n  hostname = a\n  zzz = 1\n", 3),                  # a section all indented
                ("[relay]\nhostname = a\n  listen = 25\n", 3),                # goes on with the line above
                ("[relay]\nhostname =\n  a.example\n", 3), ("[relay]\r\nhostname = a\r\nzzz = 1\r\n", 3),
                ("[relay]\nhostname = a\x0c\nzzz = 1\n", 3),                              # no line ends there
                ("[relay]\nhostname = a\0 7\n", 2), ("[relay]\nlisten\n  25\n", 2),
                ("\ufeff[relay]\nzzz = 1\n", 2), ("[relay]\nspool = x\n\n\nmax_recipients =\n", 5),
                ("[relay]\nlisten = 25\n; [domain b]\n#zzz = 2\n\n[domain a.example]\nzzz = 1\n", 7)]):
            self.assertEqual(self.error(text).split(":")[:2], ["etrn.conf", str(line)])

    def test_what_people_write_is_understood(self):
        for text, name, value in cases(self, [
                ("\ufeff[relay]\nhostname = a.example\n", "hostname", "a.example"),
                ("[relay]\r\nHostName: a.example\r\n", "hostname", "a.example"),
                ("[relay] ; here [x]\n# and\n; there\nmax_recipients = 7   # few\n", "max_recipients", 7),
                ("[tls]\ncertificate = none\n", "tls_certificate", ""),
                ("[status]\nlisten = 8025\n", "status_listen", ("0.0.0.0", 8025)),
                ("[bounces]\nusername = u\npassword = a;b # %d = c\n", "bounces_password", "a;b # %d = c"),
                ("[bounces]\nusername = ü\npassword = file:pw\n", "bounces_password", "file:/x/pw"),
                ("[alerts]\ncommand = logger %(x)s; true # it\n", "alerts_command",
                 "logger %(x)s; true # it"),
                *(("[relay]\n%s = %s\n" % (name, text), name, value) for name, text, value in (
                    ("hostname", "B.example.", "b.example"),
                    ("listen", "127.0.0.1:25,   # one\n  # more\n\t[::1]:26 ; two\n  ::1",
                     (("127.0.0.1", 25), ("::1", 26), ("::1", 25))),
                    ("listen", "2525", (("0.0.0.0", 2525), ("::", 2525))),
                    ("listen", "localhost:26", (("127.0.0.1", 26), ("::1", 26))),
                    ("command_timeout", "1.5m", 90), ("command_timeout", "30s", 30),
                    ("command_timeout", "90", 90), ("command_timeout", "1H", 3600),
                    ("max_message_size", "512K", 524288), ("max_message_size", "50M", 52428800),
                    ("max_message_size", "7", 7), ("max_message_size", "1g", 1 << 30),
                    ("user", "mail # the account", "mail"), ("user", "none", ""),
                    ("log", "stderr ; for systemd", "stderr"), ("log", "l", "/x/l"),
                    ("spool", "a#1 #2", "/x/a#1"),
                    ("nameservers", "fe80::1%eth0", (("fe80::1%eth0", 53),)),
                    ("nameservers", "[FE80:0::1%br-lan.2]:54", (("fe80::1%br-lan.2", 54),)),
                    ("nameservers", "192.0.2.1:54", (("192.0.2.1", 54),)),
                    ("nameservers", "/a/file", "/a/file"),
                    ("nameservers", "./resolv.conf", "/x/./resolv.conf")))]):
            self.assertEqual(getattr(etrn.parse_config(text, "/x/etrn.conf"), name), value)
        for section, name, text, value in cases(self, [
                ("[domain\tA.Example.]", "xclient", "on", True),
                ("[ domain  a.example ]", "cutthrough", "No", False),
                *(("[domain a.example]", "xclient", word, word in "yes On 1 True")
                  for word in "yes On 1 True no false 0 OFF".split()),
                *(("[domain a.example]", name, text, value) for name, text, value in (
                    ("max_queue_size", "none", None), ("max_retry_interval", "5s", 5),
                    ("delay_notice", "4h", 14400), ("delay_notice", "Off", 0),
                    ("lifetime", "2w", 1209600), ("lifetime", "7d", 604800),
                    ("tls", "SHA256:" + "AB:" * 31 + "cd", "sha256:" + "ab" * 31 + "cd"),
                    ("recipients", "U@A.Example,\n  v@a.example.\n", {"u@a.example", "v@a.example"}),
                    ("recipients", "file:r", "file:/x/r"),
                    ("primary", "[fe80::1%eth0]:25, fe80::2%2", (("fe80::1%eth0", 25), ("fe80::2%2", 25))),
                    ("primary", "[2001:db8::1]\n  mail.example.:26",
                     (("2001:db8::1", 25), ("mail.example", 26)))))]):
            cfg = etrn.parse_config("%s\n%s = %s\n" % (section, name, text), "/x/etrn.conf")
            self.assertEqual(getattr(cfg.domain("a.example"), name), value)
        self.assertEqual(config("", "retry_interval = 2h").domain(DOMAIN).max_retry_interval, 7200)

    def test_values_reach_their_domain_by_defaults_and_sections(self):
        cfg = etrn.parse_config(
            "[relay]\ndomains = plain.example., .wild.example. Own.example\n[defaults]\nlifetime = 2d\n"
            "[domain own.example]\nlifetime = 1h\nprimary = mail.own.example:26, [2001:db8::1]:27 192.0.2.1",
            "/x")
        for name, lifetime in cases(self, [("plain.example", 172800), ("own.example", 3600),
                ("a.wild.example", 172800)]):
            self.assertEqual(cfg.domain(name).lifetime, lifetime)
        self.assertEqual(cfg.domain("own.example").primary, (
            ("mail.own.example", 26), ("2001:db8::1", 27), ("192.0.2.1", 25)))
        for name in cases(self, ["wild.example", "a.own.example", "xown.example", "example", ""]):
            self.assertIsNone(cfg.domain(name))
        self.assertEqual(cfg.domain("b.a.wild.example").name, ".wild.example")
        self.assertEqual((cfg.first_domain, list(cfg.domains)),
                         ("plain.example", ["plain.example", ".wild.example", "own.example"]))

    def test_odmr_has_a_port_of_its_own_and_passwords_may_be_in_files(self):
        cfg = etrn.parse_config(
            "[relay]\nodmr_listen = 127.0.0.1, [::1]:367\n[domain a.example]\nprimary = ATRN\n"
            "username = a user\npassword = file:a.secret\n[domain b.example]\nprimary = etrn\n"
            "[domain .c.example]\nusername = a user\npassword = file:/x/a.secret\n", "/x/etrn.conf")
        self.assertEqual(cfg.odmr_listen, (("127.0.0.1", 366), ("::1", 367)))
        self.assertEqual([(one.primary, one.username, one.password) for one in cfg.domains.values()], [
            ("atrn", "a user", "file:/x/a.secret"), ("etrn", "", ""), ("mx", "a user", "file:/x/a.secret")])
        for name, username, expected in cases(self, [
                ("a.example", "a user", True), ("x.c.example", "a user", True),
                ("c.example", "a user", False), ("b.example", "", False), ("a.example", "other", False),
                ("other.example", "a user", False)]):
            self.assertEqual(cfg.is_owned(name, username), expected)
        self.assertFalse(config().has_logins)
        self.assertTrue(config("", "username = u\npassword = p").has_logins)

    def test_the_machine_is_asked_for_its_name_only_where_none_is_given(self):
        file = self.path("etrn.conf")
        with mock.patch.object(etrn, "fully_qualified_name", side_effect=["machine.example"]):
            for text, name in cases(self, [("[relay]\nhostname = a.example\n", "a.example"), ("",
                    "machine.example")]):
                save(file, text)
                self.assertEqual(etrn.read_config(file).hostname, name)

    def test_a_file_that_is_not_utf8_is_told_with_its_line(self):
        file = self.path("etrn.conf")
        write_files(self.folder, {"etrn.conf": b"[relay]\n# caf\xe9\n"})
        self.assertEqual(run("--config", file, "--status"), (78, "", "%s:2: not UTF-8\n" % file))

    def test_u_labels_are_served_by_their_a_label_unless_programs_disagree_about_it(self):
        cfg = etrn.parse_config("[relay]\ndomains = münchen.example xn--strae-oqa.example xn--a.test", "/x")
        self.assertEqual(list(cfg.domains), ["xn--mnchen-3ya.example", "xn--strae-oqa.example", "xn--a.test"])
        for text in cases(self, [
                "[domain straße.example]\n", "[domain .straße.example]\n", "[domain STRAẞE.example]\n",
                "[relay]\ndomains = a.example faß.test\n", "[relay]\nhostname = ς.example\n",
                "[domain a.example]\nprimary = straße.example:25\n",
                "[domain a.example]\nrecipients = u@straße.example\n",
                "[bounces]\npostmaster = u@straße.example\n", "[domain نامه\u200cای.com]\n"]):
            with self.assertRaisesRegex(etrn.ConfigError, ":[12]: .*write the A-label, xn--"):
                etrn.parse_config(text, "etrn.conf")

    def test_paths_are_taken_as_they_stand(self):
        for text in cases(self, ["[relay]\nspool = \"/var/spool/x\"\n", "[relay]\nspool = '/x'\n",
                "[relay]\nspool = ~/spool\n", "[relay]\nlog = $HOME/log\n",
                "[tls]\ncertificate = ${DIR}/c\nkey = k\n", "[relay]\nnameservers = /etc/$x\n",
                "[domain a.example]\nrecipients = file:~/r\n",
                "[domain a.example]\nusername = u\npassword = file:'p'\n",
                "[bounces]\nusername = u\npassword = file:$CREDENTIALS_DIRECTORY/p\n",
                "[relay]\nspool = a\0b\n"]):
            with self.assertRaisesRegex(etrn.ConfigError, "without quotes, ~ and \\$"):
                etrn.parse_config(text, "etrn.conf")
        cfg = etrn.parse_config("[bounces]\nusername = u\npassword = '~$\"\n[relay]\nspool = my spool",
            "/x/c")
        self.assertEqual((cfg.bounces_password, cfg.spool), ("'~$\"", "/x/my spool"))

    def test_recipients_files_are_read_as_other_programs_write_them(self):
        for text, entries in cases(self, [
                ("\ufeffA@B.Example\r\nc@d.example\r\n", {"a@b.example", "c@d.example"}),
                ("a@b.example OK\nc@b.example\tc\n@D.example. x@y\n",
                 {"a@b.example", "c@b.example", "@d.example"}),
                ("# a\n\n  # b\n a@b.example # c\nc@b.example#d\n#e@b.example\nf#g@b.example",
                 {"a@b.example", "c@b.example", "f#g@b.example"}),
                ("u@straße.example\n@straße.example",
                 {"u@xn--strae-oqa.example", "@xn--strae-oqa.example"}),
                ('"a b"@b.example x\n', {'"a b"@b.example'}),
                 ("u@münchen.example", {"u@xn--mnchen-3ya.example"}),
                ("a..b@b.example\n%s@b.example" % ("x" * 99), {"a..b@b.example", "x" * 99 + "@b.example"}),
                 ("", set())]):
            self.assertEqual(etrn.parse_recipients(text), (entries, []))
        found, wrong = etrn.parse_recipients(
            "a@b.example\nbob\n@\n@a..b\r\n\n<a@b.example>\nOK a@b.example\na@b@c\n")
        self.assertEqual((found, wrong), ({"a@b.example"}, [2, 3, 4, 6, 7, 8]))
        entries = frozenset(["u@a.example", "@b.example"])
        for text, expected in cases(self, [("<U@A.example>", True), ("<v@a.example>", False),
                ("<any@B.example.>", True), ("<u@x.b.example>", False)]):
            self.assertEqual(etrn.is_listed(etrn.parse_path(text, "5.1.3")[0], entries), expected)

    CONTRACT = """
        relay hostname= listen=0.0.0.0:25,[::]:25 spool=spool user= domains= nameservers=/etc/resolv.conf
            log=stderr log_level=info max_message_size=50M max_recipients=1000 min_free_space=100M
            max_connections=1000 max_connections_per_client=50 max_message_rate=0 command_timeout=5m
            trusted_clients= bare_newline=normalize greet_pause=0 odmr_listen=
        tls certificate= key=
        bounces route=mx username= password= postmaster=
        status listen= token=
        alerts command= webhook= mail= mail_route=mx after=5m
        domain primary=mx lifetime=7d delay_notice=off recipients=verify while_up=relay
            unknown_recipients=accept cutthrough=yes etrn=any username= password= token= tls=may
            connections=10
            probe_interval=5s retry_interval=5m max_retry_interval=1h recovery_grace=1h xclient=no
            max_queue_size="""

    def test_options_and_defaults_are_those_of_the_contract(self):
        section, table = "", {}
        for word in self.CONTRACT.split():
            name, equals, default = word.partition("=")
            if equals:
                table[section, name] = default
            else:
                section = name
        found = {place: option.default.replace(", ", ",") for place, option in etrn.OPTIONS.items()}
        self.assertEqual(found, table)

    def test_etrn_conf_sample_is_what_the_table_makes_and_parses(self):
        text, section = load(SAMPLE), ""
        self.assertEqual(text, format_sample())
        cfg = etrn.parse_config(text, "/x/etrn.conf")
        self.assertEqual((cfg.listen, list(cfg.domains)), ((("127.0.0.1", 2525),), ["example.com"]))
        found = collections.defaultdict(list)       # each line that is commented out says the default
        for header, line in re.findall(r"(?m)^#?(\[.+\])$|^#?([a-z_]+ = .*)", text):
            section = header or section
            found[section] += [line] if line else []
        every = "\n".join("\n".join([section, *lines]) for section, lines in found.items())
        self.assertEqual(etrn.parse_config(every, "/x/etrn.conf"), cfg)


class Logs(Folder):
    """Lines reach file, stderr or syslog; a log that fails stops nothing."""

    def test_a_new_log_file_is_not_for_everybody_and_is_opened_again(self):
        path, mask = self.path("log"), os.umask(0o002)
        self.addCleanup(os.umask, mask)
        log = etrn.Log(path, "info", "backup.example.net")
        self.addCleanup(lambda: log.file and log.file.close())
        log.write("smtpd", "one \udcff")
        os.rename(path, path + ".1")
        log.reopen()
        log.write("smtpd", "two", "warning")
        log.write("smtpd", "never", "debug")
        log.flush()
        for name, text in cases(self, [(path + ".1", r"one \\udcff"), (path, "warning: two")]):
            self.assertRegex(load(name), r"\A\w{3} [ \d]\d [\d:]{8} backup etrn_relay/smtpd\[\d+\]: "
                             + text + r"\n\Z")
            self.assertEqual(stat.S_IMODE(os.stat(name).st_mode), 0o640)
        self.assertRaises(OSError, log.reopen, "/nowhere/log")
        self.assertEqual(log.where, path)               # the old one stays in use

    def test_a_log_that_cannot_be_written_stops_nothing(self):
        for stream in cases(self, [None, open(os.devnull, encoding="utf-8")]):
            with mock.patch.object(sys, "stderr", stream), contextlib.closing(stream or io.StringIO()):
                log = etrn.Log("stderr", "info", "x")
                log.write("master", "text")
                log.flush()
                self.assertEqual(log.lines, [])

    def test_the_page_has_the_last_notable_lines_and_no_service_crowds_out_another(self):
        log = etrn.Log("stderr", "error", "x")
        log.write("primary", "down")
        for number in range(100):
            log.write("smtpd", "failed %d" % number, "warning")
            log.write("smtpd", "client")                # one message's lines are not notable
            log.write("primary", "detail", "debug")
        self.assertEqual(log.notable[0][1:], ("primary", "down", "info"))
        for number in range(100):
            log.write("flush", "etrn %d" % number)
        texts = [text for _, _, text, _ in log.notable]
        self.assertEqual((len(texts), texts[-1], "failed 99" in texts), (etrn.NOTABLE_MAX, "etrn 99", True))
        log.write("master", "x" * 9999)
        self.assertEqual(len(log.notable[-1][2]), etrn.LOG_TEXT_MAX)

    def test_syslog_gets_the_tag_and_the_priority_of_each_event(self):
        calls = []
        fake = mock.Mock(**dict.fromkeys(("openlog", "syslog"), lambda *given: calls.append(given)))
        with mock.patch.object(etrn, "syslog", fake):
            log = etrn.Log("syslog", "info", "x")
            log.write("smtpd", "a\0b")
            log.write("smtpd", "c", "warning")
            log.bug(ValueError("d\ne"))
        self.assertEqual(calls[:3], [("etrn_relay/smtpd", fake.LOG_PID, fake.LOG_MAIL),
                                     (fake.LOG_INFO, "a b"), (fake.LOG_WARNING, "warning: c")])
        self.assertEqual(calls[3][0], "etrn_relay/master")
        self.assertTrue(calls[4][1].startswith("error: bug: ") and calls[4][1].isprintable())
        with mock.patch.object(etrn, "syslog", None):
            self.assertRaises(OSError, etrn.Log, "syslog", "info", "x")


# == 4. SESSION ================================================================
# Dialogues run whole, octet by octet and cut at random; the actions must be
# the same each time.  Only codes are compared, and enhanced codes where given.

CHALLENGE = b"<1896.697170952@postoffice.reston.mci.net>"        # RFC 2195 2, as the next two
NAME, SECRET = "tim", "tanstaaftanstaaf"
DIGEST = base64.b64encode(b"tim b913a602c7eda7a495b4e6e7334d3890").decode()


def judge_login(login):
    is_right = login.username == NAME and login.is_right(SECRET)
    return None if is_right else etrn.Reply(535, "5.7.8", "authentication failed")


class Player:
    """Stands in for the server: answers what a session asks, and keeps its
    actions with neighbours joined.  What was discarded leaves no trace."""

    def __init__(self, session, answers=None):
        self.session = session
        self.answers = dict({"mail": None, "rcpt": None, "commit": etrn.Reply(250, "2.0.0", "queued"),
                             "etrn": etrn.Reply(250, "2.0.0", "started"), "login": judge_login,
                             "atrn": etrn.Reply(250, "2.0.0", "reversing")}, **(answers or {}))
        self.actions = []
        self.bodies = []           # of committed messages
        self.body = b""
        self.take(session.greet())

    def receive(self, data):
        self.take(self.session.receive(data))

    def take(self, actions):
        todo = collections.deque(actions)
        while todo:
            action = todo.popleft()
            if isinstance(action, etrn.Body):
                self.body += action.data
            elif isinstance(action, etrn.Ask):
                self.add(action.what, self.shown(action.value))
                if action.what == "commit":
                    self.bodies.append(self.body)
                    self.body = b""
                answer = self.answers[action.what]
                answer = answer(action.value) if callable(answer) else answer
                todo.extendleft(reversed(self.session.resume(answer)))
            elif isinstance(action, etrn.Send):
                sent = self.actions.pop()[1] if self.actions and self.actions[-1][0] == "send" else b""
                self.add("send", sent + action.data)
            else:
                self.body = b"" if isinstance(action, etrn.Discard) else self.body
                self.add(type(action).__name__.lower(), tuple(action))

    def shown(self, value):
        if not isinstance(value, etrn.Transaction):
            return value
        return (value.sender, tuple(one.address for one in value.recipients), value.size, value.body,
                value.smtputf8, self.body)

    def add(self, what, value):
        self.actions.append((what, value))

    @property
    def replies(self):
        """The last line of each reply."""
        text = b"".join(data for what, data in self.actions if what == "send").decode("utf-8")
        return [line for line in text.split("\r\n") if line and line[3:4] == " "]

    @property
    def codes(self):
        return [reply[:3] for reply in self.replies]

    @property
    def notes(self):
        return [value[0] for what, value in self.actions if what == "note"]

    @property
    def is_closed(self):
        return any(what == "close" for what, _ in self.actions)

    def count(self, what):
        return sum(kind == what for kind, _ in self.actions)


DIALOGUE_DOMAINS = "[domain .wild.example]\n[domain xn--mnchen-3ya.example]\n"


def new_session(size_limit=0, domain="", is_odmr=False, tls=None, **relay):
    text = "\n".join("%s = %s" % pair for pair in relay.items())
    cfg = config("max_message_size = %d\n%s" % (size_limit, text), domain + DIALOGUE_DOMAINS)
    session = etrn.Session(cfg, False, "192.0.2.7", CHALLENGE, is_odmr)
    session.tls = tls
    return session


def pieces(data, cuts):
    bounds = [0, *sorted(cuts), len(data)]
    return (data[start:end] for start, end in zip(bounds, bounds[1:]) if start < end)


def play(data, cuts=(), answers=None, **options):
    """A session that was sent `data` in the pieces that `cuts` make."""
    player = Player(new_session(**options), answers)
    for piece in pieces(data, cuts):
        player.receive(piece)
    return player


def play_all_ways(test, data, **options):
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


SCRIPTS = []       # name, what is sent, the options it has


def script(name, *texts, **options):
    """Dialogues, each in a session of its own: `C:` a line sent, `R:` octets without a line
    end, `S:` the code (and enhanced code) answered, `S: 421 close` when the session ends with
    it, `B:` a message that is committed.  Backslash escapes as in Python."""
    rows = []
    for text in texts:
        parts = [(kind, part.encode("utf-8").decode("unicode_escape").encode("latin-1")) for kind, part in
                 re.findall(r"\b([CRSB]): ?(.*?)(?=\s+[CRSB]:(?: |$)|\s*$)", text, re.M)]
        sent = b"".join(part + b"\r\n" * (kind == "C") for kind, part in parts if kind in "CR")
        rows.append((sent, [part.decode() for kind, part in parts if kind == "S"],
                     [part for kind, part in parts if kind == "B"]))
        SCRIPTS.append((name, sent, options))

    def test(self):
        for sent, expected, bodies in cases(self, rows):
            player = play_all_ways(self, sent, **options)
            wanted = [want.replace(" close", "") for want in expected]
            got = [reply[:len(want)] for reply, want in zip(player.replies, wanted)]
            self.assertEqual((got, len(player.replies)), (wanted, len(wanted)), player.replies)
            self.assertEqual((player.is_closed, player.bodies), (expected[-1].endswith(" close"), bodies))
    test.__name__ = "test_" + re.sub(r"\W+", "_", name)
    assert not hasattr(Dialogues, test.__name__), name
    setattr(Dialogues, test.__name__, test)


def each(prologue, commands, code, epilogue=""):
    return prologue + "".join("C: %s S: %s\n" % (command, code) for command in commands) + epilogue


def each_mail(paths, code):
    return READY + "".join("C: MAIL FROM:%s S: %s\nC: RSET S: 250\n" % (path, code) for path in paths)


READY = "S: 220\nC: EHLO client.example S: 250\n"
MAIL = READY + "C: MAIL FROM:<a@sender.example> S: 250 2.1.0\n"
RCPT = MAIL + "C: RCPT TO:<u@ourdom.example> S: 250 2.1.5\n"
DATA = RCPT + "C: DATA S: 354\n"
AGAIN = "C: MAIL FROM:<> S: 250 2.1.0\nC: RCPT TO:<u@ourdom.example> S: 250 2.1.5\n"
LATER = etrn.Reply(451, "4.3.0", "later")

# -- sessions

script("sessions that begin and end", "S: 220\nC: QUIT S: 221 close\nC: NOOP\nC: EHLO x",
       "S: 220 C: QUIT oops S: 221 close",                  # an argument is ignored, as Postfix does
       each("S: 220\n", ["HELO", "EHLO"], "501 5.5.4"),
       each("S: 220\n", ["HELO a", "HELO b", "EHLO c", "HELO d"], "250"),
       each("S: 220\n", ["NOOP", "NOOP ok", "RSET"], "250"), each("S: 220\n", ["HELP", "HELP MAIL"], "214"),
       each("S: 220\n", ["VRFY a@b.example", "VRFY <a@b.example>", "VRFY Fred"], "252",
            "C: EXPN a@b S: 502 5.5.1 C: VRFY S: 501 5.5.4 C: VRFY @@ S: 501 5.1.3 C: VRFY a@ S: 501 5.1.3"),
       "S: 220 C: STARTTLS S: 502 C: EHLO x S: 250 C: STARTTLS S: 502",
       r"S: 220 R: HELO gw\netrn ourdom.example\n S: 250 S: 250",
       *["S: 220\nC: %s / HTTP/1.1 S: 521 5.5.1 close\nC: Host: x\nC:\nC: NOOP" % verb
         for verb in ("GET", "POST", "CONNECT", "HEAD", "PUT", "OPTIONS")])
script("whole messages", r"""S: 220
    C: helo [192.0.2.1] S: 250      C: MAIL FROM:<a@b.example> S: 250 2.1.0
    C: RCPT TO:<u@ourdom.example> S: 250 2.1.5      C: DATA S: 354
    R: Subject: x\r\n\r\ntext\r\n.\r\n S: 250 2.0.0     B: Subject: x\r\n\r\ntext\r\n
    C: QUIT S: 221 close""",
       DATA + r"R: one\r\n.\r\n S: 250 2.0.0 B: one\r\n C: MAIL FROM:<> S: 250 2.1.0"
       r" C: RCPT TO:<u@a.wild.example> S: 250 2.1.5 C: DATA S: 354 R: two\r\n.\r\n S: 250 2.0.0 B: two\r\n",
       r"""S: 220
    R: EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<u@ourdom.example>\r\nRCPT TO:<u@other.example>\r\nDATA\r\n
    S: 250 S: 250 2.1.0 S: 250 2.1.5 S: 554 5.7.1 S: 354
    R: x\r\n.\r\nMAIL FROM:<>\r\nQUIT\r\n  S: 250 2.0.0 S: 250 2.1.0 S: 221 close    B: x\r\n""")
script("order of commands",
       each("S: 220\n", ["MAIL FROM:<a@b.example>", "RCPT TO:<u@ourdom.example>", "DATA", "ETRN a.example"],
            "503 5.5.1", "C: NOOP S: 250"),
       each(MAIL, ["MAIL FROM:<b@c.example>"], "503 5.5.1", "C: RCPT TO:<u@ourdom.example> S: 250"
            " C: MAIL FROM:<b@c.example> S: 503 5.5.1"),
       READY + "C: RCPT TO:<u@ourdom.example> S: 503",
       MAIL + "C: RSET S: 250 C: RSET FOO S: 250 C: DATA S: 503",
       MAIL + "C: RSET S: 250 C: RCPT TO:<u@ourdom.example> S: 503\n" + "".join(
           AGAIN + "C: %s S: 250 C: RCPT TO:<u@ourdom.example> S: 503 C: DATA S: 503\n" % one
           for one in ("HELO x", "EHLO x", "RSET")),
       READY + "C: DATA S: 503 5.5.1 C: MAIL FROM:<> S: 250 C: DATA S: 503 5.5.1\n"
       "C: RCPT TO:<u@ourdom.example> S: 250 C: DATA FOOBAR S: 501 5.5.4 C: DATA S: 354 C: . S: 250 B:")
script("the eleventh error of any kind and no refusal counts", READY + r"""
    C: MAIL FROM:<a@b.example> SIZE=99999 S: 552        C: MAIL FROM:<\xc3\xa9@b.example> S: 553
    C: MAIL FROM:<a@b.example> S: 250                   C: RCPT TO:<u@other.example> S: 554
    C: RCPT TO:<a%%b@ourdom.example> S: 554             C: RCPT TO:<\xc3\xa9@ourdom.example> S: 553
    C: DATA S: 503              C: DATA S: 503          C: MAIL FROM:<> S: 503          C: RCPT TO:<> S: 501
    C: RCPT TO:<u@ourdom.example> X=Y S: 555            C: WHAT S: 500                  C: EXPN x S: 502
    C: NOOP \x01 S: 500         C: %s S: 500            C: ETRN ourdom.example S: 503   C: BDAT x S: 501
    C: STARTTLS S: 502          C: RCPT TO:<u@other.example> S: 554
    C: HELO S: 421 4.7.0 close""" % ("x" * 3000),
       each("S: 220\n", ["FOO"] * 10, "500 5.5.2", "C: FOO S: 421 4.7.0 close C: NOOP"), size_limit=10000)
script("command lines that are none",
       each("S: 220\n", ["", r"\x80FAIL", r"HELO a\x00b", r"HELO a\rb", r"HELO\x0ba", r"HELO \x7f",
                         r"NOOP\r\x20"], "500 5.5.2", "C: NOOP \\xff S: 5\nC: NOOP S: 250"),
       "S: 220\nC: NOOP %s S: 250\nC: NOOP %s S: 500 5.5.2\nC: NOOP S: 250" % ("x" * 2041, "x" * 2044),
       "S: 220\nC: %s S: 500\nC: %s S: 500\nC: NOOP S: 250" % ("x" * 513, "x" * 1000000),
       "S: 220\nR: %s\\nNOOP\\n S: 500 5.5.2 S: 250" % ("NOOP " * 1000),
       each(READY, ["XCLIENT ADDR=127.0.0.1", "XFORWARD ADDR=192.0.2.1", "PROXY TCP4 192.0.2.1 192.0.2.2 1 2",
                    "XEXCH50 1"], "500 5.5.2",
            r"R: \r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c S: 500 S: 500 S: 500 S: 221 close"))

# -- MAIL and RCPT

script("mail parameters", each(READY, ["MAIL FROM:<> " + rest for rest in (
    "#$%=!@#", "BODY=FOOBAR", "SMTPUTF8=YES", "RET=ALL", "ENVID=a=b", "ENVID=a+2", "BODY=7BIT BODY=7BIT",
    "BODY")], "501 5.5.4", "C: MAIL FROM:<> BODY 9BIT S: 5"),
       each(READY, ["MAIL", "MAIL <a@b.example>", "MAIL LALA: <>", "MAIL FROM:<a@b.example> BODY",
                    "MAIL FROM:<a@b.example>FOO", "MAIL FROM:<a@b.example> RET"], "501 5.5.4",
            "C: MAIL FROM: S: 501 5.1.7 C: MAIL FROM:<local> S: 501 5.1.7"
            " C: MAIL FROM:<> FOO=BAR S: 555 5.5.4"
            " C: MAIL FROM:<> BODY=8bitmime SMTPUTF8 RET=hdrs ENVID=QQ+2B1 SIZE=1 S: 250 2.1.0"),
       each_mail(["<> SIZE 10000", "<> SIZE", "<> SIZE = 10000", "<> SIZE=abc", "<> SIZE=-1"], "501 5.5.4"))
script("the declared size", READY + "C: MAIL FROM:<> SIZE=10001 S: 552 5.3.4"
       " C: MAIL FROM:<> SIZE=99999999999999999999 S: 552 5.3.4 C: MAIL FROM:<> SIZE=10000 S: 250",
       "S: 220 C: HELO a S: 250 C: MAIL FROM:<a@b.example> SIZE=10000 S: 250",     # does no harm after HELO
       each_mail([r"<a@b.example> SIZE=10000", r"  <a@b.example>   size=10000\x20\x20"], "250"),
       size_limit=10000)
script("without a limit any size is taken", READY + "C: MAIL FROM:<> SIZE=99999999999999999999 S: 250")
script("senders", each_mail(["<>", " <>", '<"Fred Bloggs"@d.example>',
                             '<"()<>[]:,;@!#$%&*+-/=?^_`{}| ~.a"@d.example>'] + r"""
    <""@d.example> <"Joe\\\\Blow"@d.example> <x@d> <a'b@d.example> <$A12345@d.example> <admin@mailserver1>
    <_somename@d.example> <u@[127.0.0.1]> <u@[ipv6:2001:db8::1]> <a_b@d_e.example>
    <@r1.example,@r2.example:u@d.example>""".split(), "250"),
       *[READY + "C: MAIL FROM:%s S: 501" % path for path in [
           " Anne <a@b.example>", "a b c", "a @ b", "<%s@%s>" % ("x" * 75, ".".join(["y" * 75] * 4)),
           "><", "<a@b.example", '<"a"b"@c.example>', "<a@b..example>"]])
script("bytes outside ascii need smtputf8", READY + r"""
    C: MAIL FROM:<\xc3\xa9@d.example> S: 553 5.6.7      C: MAIL FROM:<\xff@d.example> S: 501
    C: MAIL FROM:<\xff@d.example> SMTPUTF8 S: 501
    C: MAIL FROM:<\xc3\xa9@d.example> SMTPUTF8 S: 250   C: RCPT TO:<\xc3\xa9@ourdom.example> S: 250
    C: RSET S: 250
    C: MAIL FROM:<a@m\xc3\xbcnchen.example> S: 553 5.6.7        C: MAIL FROM:<a@d.example> S: 250
    C: RCPT TO:<\xc3\xa9@ourdom.example> S: 553 5.6.7
    C: RCPT TO:<henry\xe2\x85\xa3@ourdom.example> S: 553 5.6.7
    C: RCPT TO:<u@m\xc3\xbcnchen.example> S: 553 5.6.7
    C: RCPT TO:<u@ourdom.example> ORCPT=utf-8;\xc3\xa9@x S: 553 5.6.7
    C: RCPT TO:<u@xn--mnchen-3ya.example> S: 250""")
script("recipients", each(each(MAIL, ["RCPT", "RCPT <a@b.example>", "RCPT LALA:"], "501 5.5.4"), [
    "RCPT TO:", "RCPT TO:bart <a@b.example>", "RCPT TO:<>", "RCPT TO:<bart>"], "501 5.1.3",
    "C: RCPT TO:<u@ourdom.example> FOOBAR S: 555 5.5.4"),
       each(MAIL, ["RCPT TO:<Postmaster>", "RCPT TO:<postmaster>", "RCPT TO:<POSTMASTER>"], "250"),
       each(MAIL, ["RCPT TO:<%s>" % one for one in ("host!user", "user%host", "a!b%c") * 4], "554 5.7.1",
            "C: NOOP S: 250"),
       each(MAIL, ["RCPT TO:<x@other.example>"] * 20, "554 5.7.1", "C: RCPT TO:<u@ourdom.example> S: 250"),
       each(MAIL, ["RCPT TO:<u@ourdom.example> " + value for value in (
           "NOTIFY=", "NOTIFY=NEVER,DELAY", "NOTIFY=SUCCESS,SUCCESS", "NOTIFY=NEVER,NEVER",
           "NOTIFY=DELAY NOTIFY=DELAY", "ORCPT=rfc822", "ORCPT=;x", "ORCPT=rfc822;a+", "ORCPT=rfc822;a=b",
           "ORCPT=rfc822;%s" % ("x" * 600))], "501"),
       each(MAIL, ["RCPT TO:<u@ourdom.example> " + value for value in (
           "NOTIFY=NEVER", "NOTIFY=success,delay,failure", "ORCPT=rfc822;a+3Db",
           "NOTIFY=DELAY ORCPT=rfc822;x")], "250"))
script("too many recipients", each(RCPT, ["RCPT TO:<v@ourdom.example>"] * 2, "452 4.5.3",
                                   "C: DATA S: 354 C: . S: 250 B:"), max_recipients=1)

# -- the server's answers

for what, text, reply, rest in (
        ("rcpt", READY + "C: MAIL FROM:<> SIZE=900 S: 250 C: RCPT TO:<u@ourdom.example>", etrn.too_big(800),
         " S: 552 5.3.4 C: RSET S: 250"),
        ("rcpt", MAIL + "C: RCPT TO:<u@ourdom.example>", LATER,
         " S: 451 4.3.0 C: DATA S: 503 5.5.1 C: DATA S: 503 5.5.1"),
        ("commit", DATA + "C: x\nC: .", etrn.too_big(800), " S: 552 5.3.4 B: x\\r\\n\n" + AGAIN),
        ("commit", DATA + "C: x\nC: .", LATER, " S: 451 4.3.0 B: x\\r\\n\n" + AGAIN),
        ("mail", READY + "C: MAIL FROM:<a@b.example>", etrn.Reply(452, "4.3.1", "full"),
         " S: 452 4.3.1 C: RCPT TO:<u@ourdom.example> S: 503 5.5.1 C: ETRN ourdom.example S: 250"),
        ("mail", READY + "C: MAIL FROM:<>", etrn.Reply(421, "4.3.2", "bye"), " S: 421 close C: NOOP"),
        ("rcpt", MAIL + "C: RCPT TO:<u@ourdom.example>", etrn.Reply(421, "4.3.2", "bye"), " S: 421 close"),
        ("commit", DATA + "C: x\nC: .", etrn.Reply(421, "4.3.2", "bye"), " S: 421 close B: x\\r\\n C: NOOP")):
    script("%s answered %d %s" % (what, reply.code, reply.text), text + rest, answers={what: reply})

# -- DATA

script("data", DATA + "R: .\\r\\n S: 250 2.0.0 B:",
       DATA + r"R: test\r\nmail\rdeli\x00miters\nsaved\r\n.\r\n S: 250"
       r" B: test\r\nmail delimiters\r\nsaved\r\n",
       DATA + "C: ..From\nC: ...x\nC: ..\nC: .This\nC: x.\nC: .\nS: 250"
       r" B: .From\r\n..x\r\n.\r\nThis\r\nx.\r\n",
       DATA + "C: %s\nC: .\nS: 250 B: %s\\r\\n" % ("y" * 1001, "y" * 1001),
       DATA + r"R: \xff\x80\x1b\x7f\t%s\r\n.\r\n S: 250 2.0.0 B: \xff\x80\x1b\x7f\t%s\r\n"
       % ("y" * 5000, "y" * 5000))
script("stray newlines are refused where so configured", RCPT + r"R: BDAT 4 LAST\r\na\nb\r S: 550 5.6.0",
       *[DATA + r"R: %s\r\n.\r\n S: 550 5.6.0 C: MAIL FROM:<> S: 250" % raw
         for raw in (r"test\r\nmail\rdelimiters\nsaved", r"a\x00b", r"a\nb", r"a\r\r\nb")],
       bare_newline="reject")
script("data over the limit", DATA + "C: %s" % ("z" * 200),
       DATA + "C: %s\nC: .\nS: 552 5.3.4\n" % ("z" * 99) + AGAIN
       + "C: DATA S: 354\nC: %s\nC: .\nS: 250 B: %s\\r\\n" % ("z" * 98, "z" * 98), size_limit=100)
script("data far over the limit", DATA + "C: %s\nC: %s\nC: .\nS: 552" % ("z" * 600, "y" * 1001),
       *[DATA + "R: %s S: 552 5.3.4 close" % (octet * 80000) for octet in (r"z\r\n", r"\x00")],
       size_limit=1000)
script("the first fault of a message wins", DATA + "R: %s\\n.\\n\\r\\n.\\r\\n\nS: 552 5.3.4" % ("z" * 1100),
       size_limit=1000, bare_newline="reject")
HOP = "C: Received: from a by b; x\n"
END = "C:\nC: x\nC: .\nS: 554 5.4.6"
script("hops", DATA + HOP * 100 + END, DATA + HOP * 100 + "C: .\nS: 554 5.4.6",     # a header without end
       DATA + "C: From a\nC: >From b\n" + HOP * 100 + END,
       DATA + (r"C: received: from a\r\n\tby Backup.Example.NET. (x) id 1; y" + "\n") * 3 + END,
       RCPT + "R: BDAT 2900 LAST\\r\\n%s S: 554 5.4.6" % (r"Received: from a by b; xxxx\r\n" * 100),
       *[DATA + "".join(lines) + "C: .\nS: 250 B: %s%s" % (
           front, "".join(line[3:-1] + r"\r\n" for line in lines)) for front, lines in (
           ("", [HOP] * 99 + ["C: \n", "C: Received: in the body\n"]), ("", ["C: \n"] + [HOP] * 120),
           (r"\r\n", ["C: \\tx\n"] + [HOP] * 120),
           ("", ["C: Received: from backup.example.net by xbackup.example.net; y\n"] * 5))])

# -- BDAT, RFC 3030

script("bdat", RCPT + r"R: BDAT 5\r\nab\r\nc S: 250 2.0.0 R: BDAT 4\r\nd\r\n. S: 250 2.0.0"
       r" R: BDAT 2 LAST\r\n\r\n S: 250 2.0.0 B: ab\r\ncd\r\n.\r\n C: QUIT S: 221 close",
       RCPT + r"R: BDAT 3\r\na\r\n S: 250 C: BDAT 0 LAST S: 250 B: a\r\n C: NOOP S: 250",
       RCPT + "C: bdat 0 last S: 250 B:",
       RCPT + r"R: BDAT 15 LAST\r\n..a\r\n.\r\n.\r\nx\n.y S: 250 B: ..a\r\n.\r\n.\r\nx\r\n.y\r\n",
       RCPT + r"R: BDAT 3 LAST\r\nabc S: 250 B: abc\r\n",
       RCPT + r"R: BDAT 2\r\na\r S: 250 R: BDAT 2 LAST\r\n\nb S: 250 B: a\r\nb\r\n",
       each(RCPT, ["BDAT" + rest for rest in ("", " -1", " 5x", " LAST", " 1 FIRST", " 1 LAST LAST",
                                              " 999999999999999999999", r" 1 LA\xc5\xbfT")], "501 5.5.4"))
script("bdat out of order swallows its chunk",
       MAIL + r"R: BDAT 6 LAST\r\nQUIT\r\n S: 503 5.5.1     C: RCPT TO:<u@ourdom.example> S: 250",
       r"""S: 220
    R: BDAT 6\r\nQUIT\r\n S: 503 5.5.1          C: EHLO x S: 250
    R: BDAT 6 LAST\r\nQUIT\r\n S: 503 5.5.1     C: NOOP S: 250""",
       MAIL + "C: RCPT TO:<u@other.example> S: 554 5.7.1 "                 # this one is no error
       + r"R: BDAT 6 LAST\r\nQUIT\r\n  S: 503 5.5.1 " * 12 + "C: RSET S: 250",
       each(RCPT + r"R: BDAT 3\r\na\r\n S: 250" + "\n", [
           "DATA", "RCPT TO:<v@ourdom.example>", "MAIL FROM:<>", "ETRN ourdom.example"], "503 5.5.1",
            r"C: BDAT 0 LAST S: 250 B: a\r\n"),
       RCPT + r"R: BDAT 3\r\na\r\n S: 250 C: RSET S: 250 R: BDAT 6 LAST\r\nQUIT\r\n S: 503 5.5.1"
       "\n" + AGAIN + r"R: BDAT 3 LAST\r\nb\r\n S: 250 B: b\r\n")
script("bdat over the limit", RCPT + "C: BDAT 2001 S: 552 close",
       *[text + "C: BDAT 99999999999999999999 LAST S: 552 5.3.4 close" for text in (RCPT, READY)],
       RCPT + r"R: BDAT 1001\r\n%s S: 552 5.3.4 R: BDAT 6 LAST\r\nQUIT\r\n S: 552 5.3.4 C: NOOP S: 250"
       % ("z" * 1001),
       RCPT + r"R: BDAT 2000\r\n%s S: 552 C: MAIL FROM:<> S: 503 C: RSET S: 250" % ("z" * 2000) + "\n" + AGAIN
       + r"R: BDAT 1500\r\n%s S: 552" % ("z" * 1500)
       + r" R: BDAT 3\r\nabc S: 552 C: DATA S: 503 C: BDAT 0 LAST S: 552 C: MAIL FROM:<> S: 250",
       size_limit=1000)

# -- ETRN, RFC 1985; AUTH and ATRN

script("etrn syntax", each(READY + "C: ETRN S: 500 5.5.4\n", ["ETRN " + name for name in (
    "#queue", "@", "*", "a.example b.example", "../../etc", "%2e%2e", "-x.example", "[192.0.2.1]")],
    "501 5.5.4", "C: etrn @OURDOM.example S: 250 C: ETRN ourdom.example S: 250"),
       READY + r"C: ETRN a\x00b S: 500 C: ETRN \xff S: 501 C: ETRN %s S: 501 5.5.4" % ("a" * 1000)
       + " C: ETRN @@a.example S: 501 5.5.4 C: ETRN a..b S: 501 C: ETRN ourdom.example S: 250"
       " C: MAIL FROM:<> S: 250 C: ETRN ourdom.example S: 503 5.5.1 C: RSET S: 250"
       " C: ETRN ourdom.example S: 250")
LOGIN = "username = %s\npassword = %s\n" % (NAME, SECRET)
PLAIN = base64.b64encode(("\0%s\0%s" % (NAME, SECRET)).encode()).decode()
WRONG = [base64.b64encode(text.encode()).decode()
         for text in ("\0tim\0" + SECRET[:-1], "other\0tim\0" + SECRET)]
KNOWN = READY + "C: AUTH CRAM-MD5 S: 334 %s\nC: %s S: 235 2.7.0\n" % (base64.b64encode(CHALLENGE).decode(),
                                                                      DIGEST)
script("auth is unknown where nobody has a name", each(READY, ["AUTH CRAM-MD5", "ATRN"], "502 5.5.1"))
script("auth", KNOWN + "C: AUTH CRAM-MD5 S: 503 5.5.1 C: EHLO again S: 250 C: AUTH CRAM-MD5 S: 503 5.5.1"
       " C: ETRN ourdom.example S: 250 2.0.0 C: ATRN S: 502 5.5.1",
       KNOWN + r"""C: MAIL FROM:<a@sender.example> AUTH=<> S: 250  C: RCPT TO:<u@other.example> S: 554 5.7.1
    C: RCPT TO:<u@ourdom.example> S: 250    C: DATA S: 354      R: x\r\n.\r\n S: 250 B: x\r\n
    C: ETRN ourdom.example S: 250""",
       "S: 220 C: AUTH CRAM-MD5 S: 503 5.5.1\n" + MAIL.partition("\n")[2] + r"""
    C: AUTH CRAM-MD5 S: 503 5.5.1       C: RSET S: 250                  C: AUTH S: 501 5.5.4
    C: AUTH LOGIN S: 504 5.5.4          C: AUTH PLAIN S: 538 5.7.11     C: AUTH CRAM-MD5 abc= S: 501 5.7.0
    C: auth cram-md5 S: 334             C: * S: 501 5.7.0
    C: AUTH CRAM-MD5 S: 334             C: not base 64! S: 501 5.5.2
    C: AUTH CRAM-MD5 S: 334             C: QUIT S: 535 5.7.8            C: NOOP S: 250""",
       READY + r"""
    C: AUTH CRAM-MD5 S: 334     C: dGltIGI5MTNhNjAyYzdlZGE3YTQ5NWI0ZTZlNzMzNGQzODkx S: 535 5.7.8
    C: AUTH CRAM-MD5 S: 334     C: dGlt S: 535 5.7.8        C: AUTH CRAM-MD5 S: 334     C: = S: 501 5.5.2
    C: AUTH CRAM-MD5 S: 334
    C:                          S: 421 4.7.0 close
    C: NOOP""",
       READY + "C: AUTH CRAM-MD5 S: 334\nC: %s S: 500 5.5.6\nC: NOOP S: 250" % ("A" * 3000), domain=LOGIN)
script("an auth that cannot be judged is not counted", READY
       + "C: AUTH CRAM-MD5 S: 334\nC: dGlt S: 454 4.7.0\n" * 4 + "C: NOOP S: 250", domain=LOGIN,
       answers={"login": etrn.Reply(454, "4.7.0", "later")})
script("auth plain", READY + "C: AUTH PLAIN S: 334 \nC: %s S: 235 2.7.0" % PLAIN,
       READY + "C: AUTH PLAIN %s S: 235 2.7.0" % PLAIN,
       each(READY, ["AUTH PLAIN " + text for text in WRONG], "535 5.7.8", "C: AUTH PLAIN = S: 421 close"),
       domain=LOGIN, tls="TLSv1.3")
script("on the odmr port", "S: 220 C: ATRN ourdom.example S: 530 5.7.0 C: EHLO x S: 250 C: ATRN S: 530 5.7.0"
       " C: ETRN ourdom.example S: 502 5.5.1",
       each(READY, ["MAIL FROM:<>", "RCPT TO:<u@ourdom.example>", "DATA", "VRFY x", "EXPN x", "BDAT 5",
                    "XCLIENT", "TURN"], "502 5.5.1",
            "C: NOOP S: 250 C: RSET S: 250 C: HELP S: 214 C: QUIT S: 221 close"),
       each(KNOWN, ["ATRN " + rest for rest in ("@ourdom.example", "a..b", "ourdom.example,",
                                                "a.example b.example")], "501 5.5.4"),
       domain=LOGIN, is_odmr=True)
script("atrn refused leaves the session as it was", each(KNOWN, ["ATRN", "ATRN a.example, b.example"],
                                                         "453 4.0.0", "C: QUIT S: 221 close"),
       domain=LOGIN, is_odmr=True, answers={"atrn": etrn.Reply(453, "4.0.0", "You have no mail")})


class Logins(unittest.TestCase):
    """AUTH, ATRN and STARTTLS as the session sees them."""

    def test_what_is_offered_depends_on_names_tls_and_port(self):
        for options, auth, others in cases(self, [
                ({}, [], True), ({"domain": LOGIN}, ["AUTH CRAM-MD5"], True),
                ({"domain": LOGIN, "tls": "TLSv1.3"}, ["AUTH CRAM-MD5 PLAIN"], True),
                ({"domain": LOGIN, "is_odmr": True}, ["AUTH CRAM-MD5"], False)]):
            lines = re.findall(r"(?m)^250[ -](.*)\r$", play(b"EHLO x\r\n", size_limit=4711, **options)
                               .actions[0][1].decode())
            rest = ["ENHANCEDSTATUSCODES", "ATRN"]
            if others:
                rest = "PIPELINING 8BITMIME SMTPUTF8 ENHANCEDSTATUSCODES DSN CHUNKING ETRN".split()
                rest += ["SIZE 4711", "LIMITS RCPTMAX=1000"]
            self.assertEqual(sorted(lines), sorted(["backup.example.net", *auth, *rest]))

    def test_an_atrn_that_is_granted_ends_the_session_and_hands_on_what_came_behind_it(self):
        opening = b"EHLO x\r\nAUTH CRAM-MD5\r\n%s\r\n" % DIGEST.encode()
        for argument, domains in cases(self, [(b"", ()), (b" OurDom.Example", (DOMAIN,)),
                (b" a.example, b.example", ("a.example", "b.example"))]):
            player = play_all_ways(self, opening + b"ATRN" + argument + b"\r\n", domain=LOGIN, is_odmr=True)
            self.assertEqual(player.actions[-3:], [
                ("atrn", domains), ("send", b"250 2.0.0 reversing\r\n"), ("reverse", (b"",))])
        player = play(opening + b"ATRN\r\n220 customer\r\n", domain=LOGIN, is_odmr=True)
        self.assertEqual(player.actions[-1], ("reverse", (b"220 customer\r\n",)))

    def test_starttls_forgets_who_it_was_and_lets_nothing_through_from_before(self):
        again = b"MAIL FROM:<>\r\nEHLO x\r\nAUTH PLAIN %s\r\nSTARTTLS\r\n" % PLAIN.encode()
        known = b"EHLO x\r\nAUTH CRAM-MD5\r\n%s\r\nSTARTTLS\r\n" % DIGEST.encode()
        for first, behind, codes, is_closed in cases(self, [
                (known, again, ["250", "334", "235", "220", "503", "250", "235", "503"], False),
                *[(b"EHLO x\r\nSTARTTLS\r\n" + rest, b"", ["250", "501"], True)
                  for rest in (b"NOOP\r\n", b"\n", b"RSET\r\nMAIL FROM:<a@b.example>\r\n")]]):
            session = new_session(domain=LOGIN)
            session.has_tls = True
            player = Player(session, {"starttls": ("TLSv1.3", "x")})
            player.receive(first)
            player.receive(behind)
            self.assertEqual((player.codes[1:], player.is_closed), (codes, is_closed))

    def test_failures_are_noted_in_one_line_that_fail2ban_knows(self):
        name = base64.b64encode("x\u2028] 1.2.3.4 b913".encode()).decode()
        note, = play(b"EHLO x\r\nAUTH CRAM-MD5\r\n%s\r\n" % name.encode(), domain=LOGIN).notes
        self.assertRegex(note, r"\Awarning: unknown\[192\.0\.2\.7\]: SASL CRAM-MD5 authentication failed:"
            r" .*sasl_username=x")
        self.assertTrue(note.isprintable())

    def test_a_login_is_right_or_not(self):
        digest = hmac.new(b"pass", CHALLENGE, "md5").hexdigest().encode()
        cram = [(b"u " + digest, "u", True), (b"a b " + digest, "a b", True),
                (b"u " + digest.upper(), "u", True), (b"u " + digest[:-1], "u", False),
                (b"u pass", "u", False), (digest, "", False),
                (b"\xff " + digest, "", False), (b"u" * 256 + b" " + digest, "", False)]
        plain = [(b"\0u\0pass", "u", True), (b"u\0u\0pass", "u", True), (b"\0u\0Pass", "u", False),
                 *[(raw, "", False) for raw in (b"x\0u\0pass", b"u\0pass", b"\0u\0pass\0", b"\0\0pass", b"")]]
        for mechanism, table in (("CRAM-MD5", cram), ("PLAIN", plain)):
            for response, username, is_right in cases(self, table):
                login = etrn.parse_response(mechanism, response, CHALLENGE)
                self.assertEqual((login.username, login.is_right("pass")), (username, is_right))


class Sessions(unittest.TestCase):
    """What a session asks, keeps, notes and says of itself."""

    def test_no_reply_precedes_the_question(self):
        """Each command waits for what the server is asked, and gets its own answer."""
        chance = random.Random(7)
        codes = [chance.choice([250, 450, 550, 452]) for _ in range(200)]
        answers = iter([None if code == 250 else etrn.Reply(code, "", "no") for code in codes])
        people = b"".join(b"RCPT TO:<u%d@ourdom.example>\r\n" % one for one in range(200))
        player = play(b"EHLO x\r\nMAIL FROM:<>\r\n" + people, answers={"rcpt": lambda _: next(answers)})
        self.assertEqual(player.codes[3:], list(map(str, codes)))
        events = [what for what, _ in player.actions if what != "note"]
        self.assertEqual(events[-400:], ["rcpt", "send"] * 200)

    def test_our_received_field_is_in_form_whatever_the_client_said(self):
        for helo, name, protocol in cases(self, [
                ("EHLO mx.b.example", "mx.b.example", "ESMTP"), ("HELO (x); by y", "unknown", "SMTP"),
                ("HELO a\tb", "unknown", "SMTP"), ("EHLO é\u202e", "x\r\ny", "ESMTP")]):
            session = new_session()
            Player(session).receive(helo.encode() + b"\r\nMAIL FROM:<>\r\nRCPT TO:<u@ourdom.example>\r\n")
            session.name = name
            field = etrn.format_received(session, session.transaction, "ABC123", 1764000000.0,
                                         session.transaction.recipients)
            text, shown = field.decode("ascii"), name.replace("\r\n", r"\?\?")
            self.assertRegex(text, r"(?s)\AReceived: from \S+ \(%s \[192\.0\.2\.7\]\)\r\n"
                             r"\tby backup\.example\.net .*with %s id ABC123"
                             r"\r\n\tfor <u@ourdom\.example>;\r\n\t[^\r\n]+\r\n\Z" % (shown, protocol))
            email.utils.parsedate_to_datetime(text.rpartition(";")[2].strip())      # or an error
        for count, names in cases(self, [       # a lone recipient only is named
                (1, ["u"]), (0, ["u", "v"]), (0, ["é"]), (0, ["x" * 1500]), (0, [])]):
            recipients = [etrn.Recipient(etrn.Path(name, DOMAIN), "", "") for name in names]
            field = etrn.format_received(new_session(), etrn.Transaction("a@b.example"), "A", 1764000000.0,
                                         recipients)
            self.assertEqual(field.count(b"\tfor "), count)
            self.assertLess(max(map(len, field.split(b"\r\n"))), 998)


# == 5. SMUGGLING ==============================================================
# Only CRLF . CRLF ends data, and nothing else leaves as a line end.

VECTORS = [b"\n.\n", b"\n.\r", b"\r.\n", b"\r.\r", b"\n.\r\n", b"\r.\r\n", b"\r\n.\n", b"\r\n.\r",
    b"\r\n.\r\r\n", b"\r\r\n.\r\r\n", b"\r\n\x00.\r\n", b"\r\n.\x00\r\n", b"\r\x00\n.\r\n", b"\r\n.\r\x00\n",
    b".\r", b".\n", b"\r\n..\r.\n", b"\n\n.\r\n", b"\n..\r\n", b"\n..\n", b"\r\n.\n.\r\n", b"\n.\r\r\n",
    b"\r\n..\r\n"]
EVIL = b"MAIL FROM:<evil@x.example>\r\nRCPT TO:<victim@ourdom.example>\r\nDATA\r\nSubject: evil\r\n\r\nevil"
FRONTS = [b"", b"x", b"Subject: x\r\n\r\ntext", b"Subject: x\r\n\r\n..\r\n", b"x\r\n..\r\n", b"x\n"]
OPENING = b"EHLO x\r\nMAIL FROM:<a@b.example>\r\nRCPT TO:<u@ourdom.example>\r\n"


def mended(raw):
    """What a body must become, said in another way than the relay says it."""
    text = re.sub(rb"\r\n|\r|\n", lambda match: b" " if match.group() == b"\r" else b"\r\n",
        raw.replace(b"\0", b""))
    while re.match(rb"(?:X-Mailbox-Line: .*\r\n)*>?From ", text):
        text = re.sub(rb"\A((?:X-Mailbox-Line: .*\r\n)*)(>?From )", rb"\1X-Mailbox-Line: \2", text)
    return re.sub(rb"\A((?:X-Mailbox-Line: .*\r\n)*)([ \t])", b"\\1\r\n\\2", text)


def unstuffed(raw):
    return re.sub(rb"(?m)^\.", b"", raw)        # behind any LF, bare ones too


def read_data(raw):
    """DATA octet by octet, as a table of states would: what is kept, and what follows the end."""
    # `line`: since the last LF; `before`: how the line before ended
    kept, line, before = b"", b"", b"\r\n"
    for at in range(len(raw)):
        line += raw[at:at + 1]
        if line[-1:] == b"\n":
            if line == b".\r\n" and before == b"\r\n":
                return kept, raw[at + 1:]
            kept += line[1:] if line[:1] == b"." else line
            before, line = line[-2:], b""
    return kept, None


class Smuggling(unittest.TestCase):
    """Only CRLF . CRLF ends data, wherever what looks like it stands and however it comes."""

    def check(self, stream, cuts, expected, replies):
        for cut in cuts:
            player = play(stream, cut)
            self.assertEqual(player.bodies, [expected])
            self.assertEqual(player.codes, ["220", "250", "250", "250"] + replies)
            self.assertIsNone(re.search(rb"\r(?!\n)|(?<!\r)\n|\0", player.bodies[0]))
            self.assertEqual(player.count("mail"), 1)

    def test_no_vector_ends_the_data_wherever_it_stands_and_however_it_comes(self):
        for vector, front in cases(self, itertools.product(VECTORS, FRONTS)):
            raw = front + vector + EVIL + b"\r\n"
            stream = OPENING + b"DATA\r\n" + raw + b".\r\nQUIT\r\n"
            at = len(OPENING) + 6 + len(front)
            cuts = [(), range(len(stream))]
            cuts += [(offset,) for offset in (
                range(len(stream)) if front == b"x" else range(at - 3, at + len(vector) + 4))]
            cuts += [(offset, offset + 1) for offset in range(at - 2, at + len(vector) + 2)]
            self.check(stream, cuts, mended(unstuffed(raw)), ["354", "250", "221"])

    def test_no_vector_within_bdat_nor_between_two_chunks(self):
        for vector, front in cases(self, itertools.product(VECTORS, FRONTS)):
            raw = front + vector + EVIL + b"\r\n.\r\n"
            for size in range(len(front), len(front) + len(vector) + 1):
                stream = OPENING + b"BDAT %d\r\n%sBDAT %d LAST\r\n%sQUIT\r\n" % (
                    size, raw[:size], len(raw) - size, raw[size:])
                self.check(stream, [(), range(len(stream))], mended(raw), ["250", "250", "221"])

    def test_every_vector_is_refused_at_the_true_end_where_so_configured(self):
        vectors = [vector for vector in VECTORS if vector != b"\r\n..\r\n"]     # this one alone is in order
        for vector, front, how in cases(self, itertools.product(vectors, FRONTS, ("DATA", "BDAT"))):
            raw = front + vector + EVIL + b"\r\n"
            message = b"DATA\r\n" + raw + b".\r\n" if how == "DATA" else b"BDAT %d LAST\r\n" % len(raw) + raw
            stream = OPENING + message + b"NOOP\r\n"
            for cuts in ((), range(len(stream))):
                player = play(stream, cuts, bare_newline="reject")
                self.assertEqual((player.bodies, player.count("mail")), ([], 1))
                self.assertEqual([reply[:9] for reply in player.replies[-2:]], ["550 5.6.0", "250 2.0.0"])

    def test_no_vector_ends_data_that_is_over_the_limit(self):
        for vector in cases(self, VECTORS):
            stream = OPENING + b"DATA\r\n" + b"x" * 600 + vector + EVIL + b"\r\n.\r\nNOOP\r\n"
            for cuts in ((), range(len(stream))):
                player = play(stream, cuts, size_limit=500)
                self.assertEqual((player.bodies, player.codes[-3:]), ([], ["354", "552", "250"]))

    def test_bare_newlines_before_the_true_end_and_before_dots(self):
        """A client like smtplib stuffs behind any LF; a lone dot between bare LFs never stays a line."""
        for raw, body in cases(self, [
                (b"x\n", b"x\r\n"), (b"x\r", b"x "), (b"x\r\n.\r", b"x\r\n "), (b"x\0", b"x"),
                (b"a\n..b", b"a\r\n.b"), (b"a\n.b", b"a\r\nb"), (b"a\n.\nb", b"a\r\n\r\nb"),
                (b"a\n.\r\nb", b"a\r\n\r\nb"), (b"a\r\n.\nb", b"a\r\n\r\nb"), (b"a\n..\nb", b"a\r\n.\r\nb"),
                (b"a\r.b", b"a .b"), (b"a\n\0.b", b"a\r\n.b"), (b"a\r\r\n..b", b"a \r\n.b"),
                (b"..a\n..b\n..\n...", b".a\r\n.b\r\n.\r\n..")]):
            player = play_all_ways(self, OPENING + b"DATA\r\n" + raw + b"\r\n.\r\nNOOP\r\n")
            self.assertEqual((player.bodies, player.codes[4:]), ([body + b"\r\n"], ["354", "250", "250"]))

    def test_every_short_string_is_read_as_by_another_reader_at_every_cut(self):
        """All strings of up to six of the octets that matter, each in two pieces and octet by octet."""
        for raw in cases(self, map(b"".join, itertools.product([b"\r", b"\n", b".", b"a"], repeat=6))):
            raw += b"\r\n.\r\nz"
            expected = read_data(raw)
            for cuts in [()] + [(at,) for at in range(1, 9)] + [range(len(raw))]:
                reader, kept, rest = etrn.DataReader(), b"", None
                for piece in pieces(raw, cuts):
                    if rest is not None:
                        rest += piece
                    else:
                        data, rest = reader.feed(piece)
                        kept += data
                if (kept, rest) != expected:
                    self.fail("%r cut at %s: %r" % (raw, list(cuts), (kept, rest)))

    def test_random_octets_come_out_mended_and_whole(self):
        chance = random.Random(1)
        for _ in range(400):
            raw = b"".join(chance.choice([b"\r", b"\n", b".", b"\0", b"a", b" ", b"From ", b"\r\n", b">"])
                           for _ in range(chance.randrange(1, 40)))
            if b"\r\n.\r\n" in b"\r\n" + raw + b"\r\n":
                continue
            stream = OPENING + b"DATA\r\n" + raw + b"\r\n.\r\n"
            self.check(stream, [chance.sample(range(len(stream)), 3)], mended(unstuffed(raw + b"\r\n")),
                ["354", "250"])


class Leniency(unittest.TestCase):
    """What the world sends and RFC 5321 forbids: contract 4.  And what it invites."""

    def test_a_first_line_is_mended_however_it_comes(self):
        many, mbox = b"From x\r\n" * (etrn.MAILBOX_LINES_MAX + 3), b"X-Mailbox-Line: "
        for raw, body in cases(self, [
                (b" joins: us\r\na: b\r\n", b"\r\n joins: us\r\na: b\r\n"), (b"\tx\r\n", b"\r\n\tx\r\n"),
                (b" \r\n", b"\r\n \r\n"), (b"\r x\r\n", b"\r\n  x\r\n"), (b"\0 x\r\n", b"\r\n x\r\n"),
                (b".\tx\r\n", b"\r\n\tx\r\n"), (b"From a b\r\nS: x\r\n", mbox + b"From a b\r\nS: x\r\n"),
                (b">From a b\nS: x\r\n", mbox + b">From a b\r\nS: x\r\n"),
                (b"F\0rom a\r\n", mbox + b"From a\r\n"),
                (b"From a\r\n>From b\r\nS: x\r\n", mbox + b"From a\r\n" + mbox + b">From b\r\nS: x\r\n"),
                (b"From a\r\n by evil\r\n", mbox + b"From a\r\n\r\n by evil\r\n"),
                (many, many.replace(b"F", mbox + b"F", etrn.MAILBOX_LINES_MAX)),
                *[(text, text) for text in (
                    b"From: a\r\n", b"from a\r\n", b">>From a\r\n", b"From\r\n", b">\r\n",
                    b"\r\nFrom a\r\n x\r\n", b"S: x\r\nFrom a\r\n x\r\n", b"S: x\r\n\r\nFrom a\r\n")]]):
            self.assertEqual(play_all_ways(self, OPENING + b"DATA\r\n" + raw + b".\r\n").bodies, [body])
            if not raw.startswith(b"."):
                stream = OPENING + b"BDAT 1\r\n%sBDAT %d LAST\r\n%s" % (raw[:1], len(raw) - 1, raw[1:])
                self.assertEqual(play_all_ways(self, stream).bodies, [body])

    def test_an_mbox_line_without_end_takes_no_memory(self):
        player = Player(new_session())
        player.receive(OPENING + b"DATA\r\nFrom ")
        for _ in range(20):
            player.receive(b"x" * 65536)
            self.assertLess(len(player.session.buffer + player.session.transaction.opening.held), 10)

    def test_blanks_tabs_and_line_ends_of_commands(self):
        plain = b"RCPT TO:<u@ourdom.example>"
        for line in cases(self, [
                plain + b"\r\r\n", plain + b"\n", b"RCPT TO:\t<u@ourdom.example>\r\n",
                b"RCPT\tTO:<u@ourdom.example>\t\r\n", b"\t RCPT \t TO: \t <u@ourdom.example> \t \r\r\n",
                b"rcpt to:<u@ourdom.example>\tNOTIFY=NEVER\t \tORCPT=rfc822;x\r\n",
                b"RCPT TO:u@ourdom.example\r\n", b"RCPT TO:<u@ourdom.example.>\r\n",
                b"RCPT TO:<..u.@ourdom.example>\r\n", b"RCPT TO:<" + b"u" * 500 + b"@ourdom.example>\r\n"]):
            player = play_all_ways(self, OPENING.replace(plain + b"\r\n", line)
                                   + b"DATA\t\r\r\nx\r\n.\r\nNOOP \n")
            self.assertEqual(player.codes, ["220", "250", "250", "250", "354", "250", "250"])
            self.assertEqual((player.count("rcpt"), player.bodies), (1, [b"x\r\n"]))

    def test_a_hundred_commands_without_a_message_and_then_each_is_an_error(self):
        verbs = [b"NOOP\r\n", b"RSET\r\n", b"VRFY x\r\n", b"HELP\r\n", b"EHLO x\r\n", b"HELO x\r\n"]
        flood = b"".join(itertools.islice(itertools.cycle(verbs), etrn.JUNK_COMMANDS_MAX + etrn.ERRORS_MAX))
        player = play_all_ways(self, flood)
        self.assertEqual((player.is_closed, {code[0] for code in player.codes}), (False, {"2"}))
        for verb in cases(self, verbs + [b"FOO\r\n", b"\r\n"]):
            more = play(flood + verb + b"NOOP\r\n")
            self.assertEqual((more.codes, more.is_closed), (player.codes + ["421"], True))
        message = OPENING.partition(b"\r\n")[2] + b"DATA\r\n.\r\n"
        again = play(b"EHLO x\r\n" + (b"NOOP\r\n" * 99 + message) * 20)
        self.assertEqual((again.is_closed, len(again.bodies)), (False, 20))
        refused = play(b"EHLO x\r\n" + (b"NOOP\r\n" * 99 + message) * 2, answers={"commit": LATER})
        self.assertTrue(refused.is_closed)


class Addresses(unittest.TestCase):
    """Tricks to have mail relayed to elsewhere; `our` domain is ourdom.example."""

    ELSEWHERE = r"""
        <u@other.example> <u%other.example@ourdom.example> <other.example!u@ourdom.example> <u@[127.0.0.1]>
        <@ourdom.example:u@other.example> <@other.example:u@ourdom.example> <u@[192.0.2.1]> <u@[IPv6:::1]>
        <"u@other.example"@ourdom.example> <"u@ourdom.example"@other.example> <u@evilourdom.example>
        <u@ourdom.example.evil.example> <u@example> <u@our_dom.example> <%2e%2e%2f@ourdom.example>
        <u@wild.example> <u@xwild.example> <u@xn--ourdom-xx.example> u@other.example \t<u@other.example>
        u%other.example@ourdom.example other.example!u@ourdom.example <u@other.example.> u@[192.0.2.1]
        ..u%other.example..@ourdom.example.""".split()
    NO_PATHS = r"""
        <u@other.example@ourdom.example> <u@ourdom.example@other.example> <u@> <@ourdom.example> <> <u> < >
        >< <u@ourdom.example>\x20<v@other.example> <u@ourdom.example>\t<v@other.example>
        <u@ourdom.example\t> <u@ourdom.example>,<v@other.example> <u@ourdom.example\0.evil.example>
        <$(id)@ourdom.example> <a\rRCPT\x20TO:<v@other.example>@ourdom.example> <(c)u@ourdom.example>
        <\u202eu@ourdom.example> <e\u0301@ourdom.example> <u\x20@ourdom.example> <"u@ourdom.example>
        <u@other.example\t@ourdom.example> <u@[fe80::1%eth0]> <u@[IPv6:fe80::1%eth0]> <u@ourdom.example..>
        <u@.ourdom.example> postmaster@ <u@ourdom.example\rRCPT\x20TO:<v@other.example>
        <u@ourdom.example>\rRCPT\x20TO:<v@other.example> <u@ourdom.example>NOTIFY=NEVER
        u@ourdom.example\tv@other.example u@other.example,u@ourdom.example "a\tb"@ourdom.example
        @ourdom.example:u@other.example u@[IPv6:fe80::1%eth0] <u@ourdom.example>\0
        <u@ourdom.example>\x0bNOTIFY=NEVER <u@ourdom.example <u@ourdom.example>x <u@a.wild.example..>
        <u@a..wild.example> <u@-a.wild.example> <u@[127.0.0.256]> <u@[1.2.3]> <u@[IPv6:1]> <u@[]> <u@xn--->
        <u@[IPv6:fe80::1%25eth0]> <u@[127.0.0.1%lo]> <u@[127.0.0.1].> <a"b@ourdom.example>
        <"a"b"@ourdom.example> <u\0@ourdom.example> <@r.example:> <@r..example:u@ourdom.example>
        <<u@ourdom.example>> u@ourdom.example.. a\x20b@ourdom.example u@a\x20ourdom.example
        u@ourdom.example> u@ourdom.example@ourdom.example @ourdom.example a<u@ourdom.example
        Anne\x20<u@ourdom.example> "a\x20b"@ourdom.example postmasters u@ourdom.example\xa0X=1
        <a\tb@ourdom.example> <"a\tb"@ourdom.example> <u@a\u2024b.wild.example> <u@a\u3002wild.example>
        u@ourdom.example<v@ourdom.example>""".split() + [
            "<u@%sourdom.example>" % ("x." * 120), "<u@%s.wild.example>" % ".".join(["d" * 60] * 5)]

    def test_mail_for_elsewhere_is_refused_whatever_its_disguise(self):
        for path, code in cases(self, [(path, "554 5.7.1") for path in self.ELSEWHERE]
                                + [(path, "5") for path in self.NO_PATHS]):
            for verb in ("RCPT TO:", "RCPT\tTO:"):
                line = (verb + path).encode().decode("unicode_escape").encode()
                player = play_all_ways(self, b"EHLO x\r\nMAIL FROM:<a@b.example>\r\n%s\r\n" % line)
                self.assertEqual([reply[:len(code)] for reply in player.replies[3:]], [code])
                self.assertEqual(player.count("rcpt"), 0)

    def test_a_line_end_within_an_address_begins_another_bad_command(self):
        for newline in cases(self, [b"\r\n", b"\n", b"\r\r\n"]):
            player = play_all_ways(self, b"EHLO x\r\nMAIL FROM:<a@b.example>\r\nRCPT TO:<a" + newline
                                   + b"RCPT TO:<v@other.example>@ourdom.example>\r\n")
            self.assertEqual(player.codes[3:], ["501", "501"])

    def test_our_own_addresses_are_accepted_in_every_spelling(self):
        for path, address, domain in cases(self, [
                ("<postmaster>", "postmaster@ourdom.example", DOMAIN),
                ("PostMaster", "PostMaster@ourdom.example", DOMAIN),
                ("<Postmaster@OURDOM.example.>", "Postmaster@OURDOM.example", DOMAIN),
                ("<u@a.b.wild.example>", "u@a.b.wild.example", "a.b.wild.example"),
                ("<u@XN--mnchen-3ya.example>", "u@XN--mnchen-3ya.example", "xn--mnchen-3ya.example"),
                ("<u@münchen.example>", "u@münchen.example", "xn--mnchen-3ya.example"),
                *[("<%s>" % one, one, DOMAIN) for one in (
                    "u@OURDOM.Example", "../../etc/x@ourdom.example", "-oX@ourdom.example",
                    "|cmd@ourdom.example", '"a b"@ourdom.example')]]):
            player = play(b"EHLO x\r\nMAIL FROM:<a@b.example> SMTPUTF8\r\nRCPT TO:%s\r\n" % path.encode())
            asked = [(value.address, value.path.domain) for what, value in player.actions if what == "rcpt"]
            self.assertEqual((asked, player.replies[-1][:9]), ([(address, domain)], "250 2.1.5"))


# -- fuzz: a second each, seeded; ETRN_RELAY_LONG=600 makes it ten minutes

def seeds(test, seconds=1.0):
    """Sources of chance until the time is over; a failure names the seed."""
    end = time.monotonic() + seconds * LONG
    for seed in itertools.count(int(LONG * 1000)):
        if time.monotonic() > end:
            break
        test.row = seed
        yield random.Random(seed)
    del test.row


def mutated(chance, data, words):
    """Some octets changed, left out, doubled, or replaced by what may hurt."""
    out = bytearray(data)
    for _ in range(chance.randrange(1, 6)):
        at = chance.randrange(len(out) + 1)
        end = min(len(out), at + chance.choice([0, 1, 1, 2, 5, 40]))
        noise = bytes(chance.randrange(256) for _ in range(chance.randrange(8)))
        out[at:end] = chance.choice([b"", noise[:1], bytes(out[at:end]) * 2, chance.choice(words), noise])
    return bytes(out)


COMMAND_WORDS = [b"\r\n", b"\n", b"\r", b"\0", b"\t", b"\r\r\n", b"\n.", b"\r\n.\r\n", b"<>", b" ",
    b"DATA\r\n", b"RSET\r\n", b"QUIT\r\n", b"BDAT 3\r\nabc", b"BDAT 0 LAST\r\n", b"BDAT 99999999999\r\n",
    b"EHLO x\r\n", b"MAIL FROM:<a@b.example>\r\n", b"SIZE=1", b" BODY=8BITMIME",
    b"RCPT TO:<u@ourdom.example>\r\n", b"RCPT TO:<u@other.example>\r\n", b"ETRN ourdom.example\r\n",
    b"\xc3\xa9", b"\xff", b" SMTPUTF8", b"NOTIFY=NEVER", b"x" * 2100, b"@", b'"', b"\\", b"STARTTLS\r\n",
    b"GET / HTTP/1.1\r\n", b"Received: by backup.example.net\r\n" * 3, b"VRFY @@\r\n", b"HELP\r\n", b"xn--",
    b"[127.0.0.1]", b"..", b"%", b"!", b"From ", b">From x\r\n", b"\r\n ", b"AUTH=<>", b"NOOP\r\n" * 60]
DIALOGUE = (b"EHLO x\r\nMAIL FROM:<a@b.example> SIZE=100 BODY=8BITMIME RET=HDRS ENVID=x\r\n"
            b"RCPT TO:<u@ourdom.example> NOTIFY=DELAY\r\nRCPT TO:<postmaster>\r\n"
            b"DATA\r\nSubject: x\r\n\r\n..text\r\n.\r\nNOOP\r\nMAIL FROM:<>\r\nRCPT TO:<u@a.wild.example>\r\n"
            b"BDAT 8\r\na: b\r\n\r\nBDAT 3 LAST\r\nxy\nVRFY u\r\nETRN @ourdom.example\r\n"
            b"MAIL FROM:<\"a b\"@[192.0.2.1]>\r\nRSET\r\nQUIT\r\n")


class Whims(Player):
    """A server that answers by the question alone, so that every cut of a dialogue gets the same answers."""

    def add(self, what, value):
        super().add(what, value)
        refusal = [None, None, None, etrn.Reply(450, "4.2.0", "no"), etrn.Reply(550, "5.1.1", "no")][
            hashlib.sha256(repr((what, value)).encode()).digest()[0] % 5]
        self.answers.update(mail=refusal, rcpt=refusal, starttls=("TLSv1.3", "X"),
                            commit=refusal or etrn.Reply(250, "2.0.0", "queued"))


class Fuzz(unittest.TestCase):
    """Whatever comes is answered or refused, and the same however it is cut."""

    def played(self, data, cuts, options, has_tls):
        session = new_session(**options)
        session.has_tls = has_tls
        player = Whims(session)
        for piece in pieces(data, cuts):
            player.receive(piece)
            self.assertLessEqual(len(session.buffer), max(etrn.COMMAND_MAX, len(piece)))
        return player

    def test_any_dialogue_is_answered_in_order_however_it_is_cut(self):
        for chance in seeds(self, 2.0):
            options = {"size_limit": chance.choice([0, 0, 150, 3000]),
                       "max_recipients": chance.choice([1, 1000]),
                       "bare_newline": chance.choice(["normalize", "reject"])}
            data = mutated(chance, DIALOGUE, COMMAND_WORDS)
            # then a cut behind STARTTLS is where TLS begins, and not the same
            has_tls = chance.random() < 0.2
            whole = self.played(data, (), options, has_tls)
            for cuts in (range(len(data)), chance.sample(range(len(data)), min(len(data), 4))):
                other = self.played(data, cuts, options, has_tls)
                if not has_tls:
                    self.assertEqual(other.actions, whole.actions)
            sent = b"".join(data for what, data in whole.actions if what == "send")
            self.assertRegex(sent, rb"\A(?:[2-5]\d\d[ -][^\r\n\0]*\r\n)+\Z")
            self.assertNotRegex(sent, rb"(?m)^250-[^\n]*\n(?!250)")
            for body in whole.bodies:
                self.assertNotRegex(body, rb"\r(?!\n)|(?<!\r)\n|\0|\A(?:[ \t]|>?From )")
            if whole.is_closed:
                self.assertEqual(whole.actions[-1][0], "close")
            self.assertTrue(all(note.isprintable() for note in whole.notes))

    def test_random_octets_in_every_state(self):
        states = [b"", b"EHLO x\r\n", OPENING.partition(b"RCPT")[0], OPENING, OPENING + b"DATA\r\n",
                  OPENING + b"BDAT 100\r\n", OPENING + b"BDAT 1\r\nx", b"x" * 3000]
        for chance in seeds(self):
            state = chance.choice(states)
            noise = b"".join(chance.choice([bytes([chance.randrange(256)]), chance.choice(COMMAND_WORDS)])
                             for _ in range(chance.randrange(60)))
            cuts = [len(state)] + [len(state) + chance.randrange(len(noise) + 1) for _ in range(3)]
            whole = self.played(state + noise, (), {}, False)
            self.assertEqual(self.played(state + noise, cuts, {}, False).actions, whole.actions)

    def test_paths_that_are_taken_are_paths_when_they_are_sent(self):
        """What was judged is what is sent: a path parsed, shown and parsed again is the same."""
        letters = [*"ab.@\"\\ \t<>[]:,%!éß-1", "xn--", "127.0.0.1", "IPv6:::1", "postmaster"]
        for chance in seeds(self, 0.5):
            for _ in range(200):
                inner = "".join(chance.choice(letters) for _ in range(chance.randrange(1, 10)))
                for text in (inner, "<%s>" % inner):
                    try:
                        path, rest = etrn.parse_path(text, "5.1.3")
                    except etrn.Refuse:
                        continue
                    again, left = etrn.parse_path("<%s>" % str(path), "5.1.3")
                    self.assertEqual((str(again), again.domain, left), (str(path), path.domain, ""))
                    self.assertIn(rest[:1], ("", " ", "\t"))
                    self.assertNotRegex(str(path), r"[\x00-\x1f\x7f]")

    def test_any_packet_is_an_answer_or_an_error(self):
        name = "mail.example.org"
        good = [dns_answer(7, name, kind, [record(name, kind, data)] * 3) for kind, data in (
            (etrn.A, "192.0.2.1"), (etrn.AAAA, "2001:db8::1"), (etrn.MX, (10, "mx.example.org")))]
        words = [b"\xc0\x0c", b"\xc0\x00", b"\xc0\xff", b"\0", b"\xff\xff", b"\x3f" + b"x" * 63, b"\x40",
            b"\x80", struct.pack("!HH", 5, 1)]
        for chance in seeds(self):
            kind = chance.choice([etrn.A, etrn.AAAA, etrn.MX, etrn.CNAME])
            packet = mutated(chance, chance.choice(good), words)
            if chance.random() < 0.5:   # its head as it should be
                head = dns_answer(7, name, kind)
                packet = head[:6] + packet[6:12] + head[12:] + packet[12:]
            with contextlib.suppress(etrn.DnsError):
                answer = etrn.parse_answer(packet, 7, name, kind)
                if answer is not None:
                    self.assertLessEqual(len(answer.records), etrn.DNS_RECORDS_MAX)

    def test_any_reply_is_a_code_or_an_error_however_it_is_cut(self):
        def read(data, cuts):
            replies, out = etrn.Replies("mx.example"), []
            try:
                for code, text in (reply for piece in pieces(data, cuts) for reply in replies.feed(piece)):
                    self.assertTrue(200 <= code <= 599 and etrn.reply_text(code, text).isprintable())
                    status = r"\A%d\.\d{1,3}\.\d{1,3}\Z" % (code // 100)
                    self.assertRegex(etrn.reply_status(code, text), status)
                    out.append((code, text))
            except etrn.PeerError as error:
                self.assertTrue(str(error).isprintable())
                out.append(str(error))
            return out

        real = (b"250-mx.example\r\n250-PIPELINING\r\n250-SIZE 1000\r\n250-AUTH=LOGIN PLAIN\r\n"
                b"250 8BITMIME\r\n250 2.1.0 ok\r\n550-5.1.1 no\r\n550 5.1.1 user\r\n354 go\r\n"
                b"250 2.0.0 taken\r\n421 bye\r\n")
        words = [b"\r\n", b"\n", b"\r", b"250-", b"250 ", b"550 ", b"25", b"999 ", b"-1", b"\0", b"\xff",
            b"4.7.0 ", b" ", b"500 no\r\n"]
        for chance in seeds(self):
            data = mutated(chance, real, words)
            whole = read(data, ())
            self.assertEqual(read(data, range(len(data))), whole)
            self.assertEqual(read(data, chance.sample(range(len(data)), 3)), whole)


# == 6. SPOOL ==================================================================
# Each file operation stopped, failed and cut; what people do to a directory; what version 0.1 left in it.

USER, OTHER = "user@" + DOMAIN, "other@" + DOMAIN


def sidecar_of(id, recipients=(USER,), **values):
    now = time.time()
    fields = etrn.make_sidecar(id, "mail", recipients[0].rpartition("@")[2], "a@sender.example",
                               [(one, "", "") for one in recipients], now, now + 86400,
                               {"address": "192.0.2.7", "helo": "x", "tls": None})
    return dict(fields, **values)


def old_sidecar(id, recipients, held=(), **values):
    """As version 0.1 wrote it: each recipient names its domain, `held` those that are held."""
    sidecar = sidecar_of(id, recipients, format=1, held=list(held), **values)
    del sidecar["domain"]
    for one in sidecar["recipients"]:
        one["domain"] = one["address"].rpartition("@")[2]
    return sidecar


def pair(sidecar, data=MESSAGE):
    """The files of a queued message."""
    whole = dict(sidecar, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    return {sidecar["id"] + ".eml": data, sidecar["id"] + ".json": etrn.format_sidecar(whole)}


def write_files(folder, files):
    """None is a folder."""
    for name, data in sorted(files.items()):
        if data is None:
            os.makedirs(os.path.join(folder, name), exist_ok=True)
        else:
            with open(os.path.join(folder, name), "wb") as file:
                file.write(data)


def store(spool, id, data=MESSAGE, **values):
    """Accept a message; None when it may be acknowledged."""
    return spool.commit([(id, data, [sidecar_of(id, **values)])])[0]


def opened(folder):
    spool = etrn.Spool(folder)
    spool.open()
    return spool


def start(spool):
    """What a start makes of a spool, in the relay's order: (sidecar, body) by ID, or an exception."""
    ids, alone = spool.list()
    for id in alone:
        spool.set_aside(id, "alone")
    for id, found in zip(ids, spool.load(ids)):
        if isinstance(found, etrn.Corrupt):
            spool.set_aside(id, str(found))
        elif isinstance(found, list) and len(found) > 1:
            spool.convert(id)
    return {id: spool.read([id])[0] for id in spool.list()[0]}


def recover(spool):
    """What a start finds: the queued messages, intact.  One that is not fails the test."""
    return {id: data for id, (_, data) in start(spool).items()}


# -- a disk in memory

class Node:
    """A file or folder of a Platter: what it is now, and what of that a power cut would leave at least."""

    def __init__(self, data=None):
        self.is_folder, self.is_given_up = data is None, False      # its fsync failed
        self.data = self.safe = data or b""
        self.names = {}      # of a folder
        self.safe_names = {}
        self.pending = {}    # name: what it has meant since the last fsync

    def set(self, name, node):
        self.pending.setdefault(name, []).append(node)
        if node is None:
            del self.names[name]
        else:
            self.names[name] = node


class Platter:
    """A file system in memory that stands for the module `os` within etrn_relay, and keeps after a power cut
    only what POSIX says: the octets a file had at its fsync, and the names a folder had at its own.  Of all
    that is not synced any part may have reached the disk, in any order: the two halves of a rename each for
    itself, an octet string torn or as zeros.  Only that a name means one file or the other is certain, and
    that an unsynced rename does not lose the file: its old name goes after the new one is there.

    `on_step` is called before each operation that changes something; `fault` gives the errno with which the
    nth operation fails, or 0; `most` octets go into one write."""

    def __init__(self, state, age_s=0.0):
        self.root = Node()
        self.files = {}    # descriptor: (node, where reading goes on)
        self.renames = []    # (folder, name, file, new folder, new name)
        self.count, self.most, self.time = 0, 1 << 30, time.time() - age_s
        self.on_step = lambda: None
        self.fault = lambda number, name: 0
        for path, data in sorted(state.items()):
            folder, name, _ = self._at(path)
            folder.names[name] = folder.safe_names[name] = Node(data)

    def __getattr__(self, name):
        if name.startswith(("O_", "ST_", "POSIX_")) or name in ("path", "getpid"):
            return getattr(os, name)
        if name in ("posix_fadvise", "ftruncate", "pwrite", "fstatvfs"):        # advice, and the lock's text
            return lambda *_: self._step(name, False) or types.SimpleNamespace(f_flag=0)
        raise AttributeError("the disk's model knows no os." + name)

    # -- what stands for os

    def _at(self, path, dir_fd=None, must=False):
        """The folder that a name is in, the name, and what it means."""
        node = self.root if dir_fd is None else self.files[dir_fd][0]
        folder, name = node, ""
        for part in path.split("/"):
            if part not in ("", "."):
                if node is None or not node.is_folder:
                    raise OSError(errno.ENOENT, "No such file or directory", path)
                folder, name, node = node, part, node.names.get(part)
        if node is None and must:
            raise OSError(errno.ENOENT, "No such file or directory", path)
        return folder, name, node

    def _step(self, name, is_change=True):
        if is_change:
            self.on_step()
        number, self.count = self.count, self.count + 1
        code = self.fault(number, name)
        if code:
            raise OSError(code, os.strerror(code))

    def _make(self, path, dir_fd, node):
        folder, name, found = self._at(path, dir_fd)
        if found is not None:
            raise OSError(errno.EEXIST, "File exists", path)
        folder.set(name, node)

    def open(self, path, flags, mode=0o777, dir_fd=None):
        self._step("open", bool(flags & os.O_CREAT))
        if flags & os.O_EXCL or (flags & os.O_CREAT and self._at(path, dir_fd)[2] is None):
            self._make(path, dir_fd, Node(b""))
        fd = max(self.files, default=99) + 1
        self.files[fd] = (self._at(path, dir_fd, True)[2], 0)
        return fd

    def read(self, fd, most):
        self._step("read", False)
        node, at = self.files[fd]
        data = node.data[at:at + most]
        self.files[fd] = (node, at + len(data))
        return data

    def write(self, fd, data):
        self._step("write")
        part = bytes(data)[:self.most]
        self.files[fd][0].data += part
        return len(part)

    def fsync(self, fd):
        node = self.files[fd][0]
        if node.is_given_up:
            raise AssertionError("a file whose fsync failed is synced again")
        try:
            self._step("fsync")
        except OSError:
            node.is_given_up = not node.is_folder
            raise
        node.safe, node.safe_names = node.data, dict(node.names)
        node.pending.clear()

    def close(self, fd):
        node, _ = self.files.pop(fd)    # gone, even when this fails
        if not node.is_folder:
            self._step("close")

    def rename(self, old, new, src_dir_fd, dst_dir_fd):
        self._step("rename")
        here, name, node = self._at(old, src_dir_fd, True)
        there, new_name, found = self._at(new, dst_dir_fd)
        if found is not node:           # of two links to one file nothing is done, rename(2)
            there.set(new_name, node)
            here.set(name, None)
            self.renames.append((here, name, node, there, new_name))

    def link(self, old, new, src_dir_fd, dst_dir_fd):
        self._step("link")
        self._make(new, dst_dir_fd, self._at(old, src_dir_fd, True)[2])

    def unlink(self, path, dir_fd=None):
        self._step("unlink")
        folder, name, _ = self._at(path, dir_fd, True)
        folder.set(name, None)

    def mkdir(self, path, mode=0o777, dir_fd=None):
        self._step("mkdir")
        self._make(path, dir_fd, Node())

    def rmdir(self, path, dir_fd):
        if self._at(path, dir_fd, True)[2].names:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", path)
        self.unlink(path, dir_fd)

    def makedirs(self, path, mode, exist_ok):
        with contextlib.suppress(FileExistsError):
            self.mkdir(path, mode)      # those above are there

    def listdir(self, path):
        self._step("listdir", False)
        return list((self.files[path][0] if isinstance(path, int) else self._at(path, None, True)[2]).names)

    @contextlib.contextmanager
    def scandir(self, fd):
        yield [types.SimpleNamespace(name=name, stat=lambda follow_symlinks, name=name: self.stat(name, fd))
               for name in self.listdir(fd)]

    def stat(self, path, dir_fd=None):
        self._step("stat", False)
        node = self._at(path, dir_fd, True)[2]
        return types.SimpleNamespace(
            st_mode=stat.S_IFDIR if node.is_folder else stat.S_IFREG, st_size=len(node.data), st_dev=1,
            st_ino=id(node), st_mtime=self.time, st_ctime=self.time)

    lstat = stat

    def fstat(self, fd):
        return self.stat(".", fd)

    # -- power cuts

    def states(self, chance, most):
        """What a power cut may leave now: all of it when that is not more than `most`, else the plain ones,
        each single exception to these, and some by chance."""
        options = self._options()
        total = functools.reduce(lambda product, one: product * len(one), options.values(), 1)
        values = list(options.values())
        for pick in self._some(values, chance, most) if total > most else itertools.product(*values):
            chosen = dict(zip(options, pick))
            for here, name, node, there, new_name in self.renames:
                if name in here.pending and chosen[here, name] is None:
                    if chosen.get((there, new_name), there.safe_names.get(new_name)) is not node:
                        chosen[here, name] = node
            yield self._state(chosen)

    def killed(self):
        """What there is when the process dies, and the machine does not."""
        return self._state({what: values[-1] for what, values in self._options().items()})

    @staticmethod
    def _some(options, chance, most):
        for plain in ([one[0] for one in options], [one[-1] for one in options]):
            yield plain
            for at, values in enumerate(options):
                for value in values:
                    yield plain[:at] + [value] + plain[at + 1:]
        for _ in range(most):
            yield [chance.choice(values) for values in options]

    def _options(self):
        """What names of a folder and octets of a file (None) may be, the synced first, the newest last."""
        options = {}
        found, left = set(), [self.root]
        while left:
            node = left.pop()
            if node not in found:
                found.add(node)
                for name, values in node.pending.items():
                    now = node.names.get(name)
                    others = [one for one in (node.safe_names.get(name), *values) if one is not now]
                    options[node, name] = [*dict.fromkeys(others), now]
                if node.data != node.safe:
                    torn, zeros = node.data[:len(node.data) // 2], b"\0" * len(node.data)
                    options[node, None] = list(dict.fromkeys([node.safe, torn, zeros, node.data]))
                left += [*node.names.values(), *node.safe_names.values()]
                left += [one for values in node.pending.values() for one in values if one is not None]
        return options

    def _state(self, chosen):
        state = {}

        def walk(folder, path):
            for name in {**folder.safe_names, **folder.pending}:
                node = chosen.get((folder, name), folder.safe_names.get(name))
                if node is not None:
                    state[path + name] = None if node.is_folder else chosen.get((node, None), node.safe)
                    walk(node, path + name + "/")
        walk(self.root, "/")
        return state


# -- stories

def seen(sidecar, data=MESSAGE, **states):
    """Body, states of the recipients, domain, and whether it is held."""
    people = {one["address"]: one["state"] for one in sidecar["recipients"]}
    people.update((name + "@" + DOMAIN, state) for name, state in states.items())
    return data, people, sidecar["domain"], sidecar["held"]


class PowerCuts(Folder):
    """Stories on a disk in memory: every moment is cut, in each way there is, and every call fails.  In what
    is left each message is as it was promised: as before a step or as after it, never anything else."""

    SPOOL = "/var/spool/etrn"
    ZERO, ONE, FIVE, SIX, SEVEN, NOTICE = "ABCDE0", "ABCDE1", "ABCDE5", "ABCDE6", "ABCDE7", "ABCDF0"
    # Left by crashes: S1, S2, S3, S5 of the spool's banner, and finished files of version 0.1; S6 and S7
    DELETED = ("incoming/ABCDE5.eml", "incoming/ABCDE6.eml", "incoming/ABCDE6.json", "ABCDE7.eml",
               "incoming/ABCDE7.json", "incoming/ABCDE0.new", "incoming/ABCDE1.json", "done/ABCDE1.json",
               "ABCDE8.eml", "done/ABCDE8.json", "done/ABCDE9.json", "done/ABCDE9.eml")
    CORRUPT = ("ABCDEA.eml", "ABCDEB.json")
    ACCEPTING = ("accept", "batch", "several", "several_copied")
    CHANGING = ("discard", "hold", "shift", "deliver_part", "remove", "bounce", "bounce_part", "set_aside",
                "heal", "save")
    OPENING = ("first", "begin", "take_over", "take_over_copied")       # with open()
    NAMES = ACCEPTING + CHANGING + OPENING
    PARTS = {"ABCDE9": ["a@one.example"], "ABCDE901": ["b@two.example", "d@two.example"],
             "ABCDE902": ["c@three.example"]}

    def setUp(self):
        super().setUp()
        self.chance = random.Random(6)
        still = mock.patch.object(time, "time", lambda: 1764000000.0)       # equal states are checked once
        still.start()
        self.addCleanup(still.stop)
        self.two = {self.ZERO: sidecar_of(self.ZERO, [USER, OTHER]), self.ONE: sidecar_of(self.ONE)}

    def platter_for(self, name):
        """What a story begins with; and what each message and file may be before its first step."""
        files = {"incoming": None, "corrupt": None}
        promised = {}
        for id, sidecar in self.two.items():
            files.update(pair(sidecar))
            promised[id] = [seen(sidecar)]
        if name == "first":
            files, promised = {}, {}
        elif name.startswith("take_over"):
            people = [one for its in self.PARTS.values() for one in its]
            files.update({"done": None, "done/ABCDE5.eml": b"", "done/ABCDE5.json": b"{}",
                          **pair(old_sidecar("ABCDE9", people, ["two.example"]))})
            for id, people in self.PARTS.items():
                promised[id] = [seen(sidecar_of(id, people, held="two" in people[0]))]
        elif name == "begin":
            files.update({"done": None, **dict.fromkeys(self.DELETED + self.CORRUPT, b"left")})
            promised.update({"ABCDE7.eml": [b"left", None], "ABCDE8.eml": [b"left", None]})
            promised.update((name + " or aside", [b"left"]) for name in self.CORRUPT)
        elif name == "set_aside":
            files["ABCDE0.json"] = b"{"
            promised[self.ZERO] = [None]
            for key in ("ABCDE0.json", "ABCDE0.json or aside", "ABCDE0.eml", "ABCDE0.eml or aside"):
                promised[key] = [MESSAGE if "eml" in key else b"{"]
        state = {"/var": None, "/var/spool": None, **({self.SPOOL: None} if files else {})}
        state.update(("%s/%s" % (self.SPOOL, one), data) for one, data in files.items())
        platter = Platter(state)
        platter.most = 300              # short writes are no errors
        return platter, promised

    def steps(self, name):
        """({message or file: what it is after that}, method of Spool, values)"""
        zero, first = self.ZERO, self.ONE
        three = {id: sidecar_of(id) for id in (self.FIVE, self.SIX, self.SEVEN)}
        apart = {id: sidecar_of(id, ["u@%s.example" % id.lower()]) for id in three}
        bodies = {id: b"one\r\ntwo\r\n" + id.encode() for id in three}
        notice = sidecar_of(self.NOTICE, ["a@sender.example"], kind="notice", sender="")
        told = {self.NOTICE: seen(notice, b"multipart/report")}
        accept = [({id: seen(one)}, "commit", [(id, MESSAGE, [one])]) for id, one in three.items()]

        def record(id, after, state, **more):
            notices = [(self.NOTICE, b"multipart/report", notice)] if more else []
            return [({id: after, **more}, "record", id, {}, {USER: {"state": state}}, notices)]
        return {
            "accept": accept[:1], "first": accept[:2],
            "batch": [*(({}, "append", id, bodies[id][:5]) for id in (self.SIX, self.SEVEN)),
                      ({id: seen(three[id], bodies[id]) for id in three}, "commit", [
                          (id, bodies[id][5 * (id != self.FIVE):], [three[id]]) for id in three])],
            "several": [({id: seen(one) for id, one in apart.items()}, "commit", [
                (self.FIVE, MESSAGE, [*apart.values()])])],
            "discard": [({}, "append", self.FIVE, b"one\r\n"), ({}, "discard", self.FIVE)],
            "hold": [({zero: seen(dict(self.two[zero], held=held))}, "record", zero, {"held": held}, {})
                     for held in (True, False)],
            "shift": [({}, "shift", [zero, first], 3600.0)],
            "deliver_part": record(zero, seen(self.two[zero], user="delivered"), "delivered"),
            "bounce_part": record(zero, seen(self.two[zero], user="bounced"), "bounced", **told),
            "bounce": record(first, None, "bounced", **told),
            "remove": [({zero: None, first: None}, "remove", [zero, first])],
            "set_aside": [({"ABCDE0.json": None, "ABCDE0.eml": None}, "set_aside", zero, "why")],
            "save": [({"state.json": b'{"n": %d}\n' % n}, "save", "state.json", {"n": n}) for n in (1, 2)],
            "heal": [({}, "heal")], "take_over": [({}, "convert", "ABCDE9")],
            "begin": [({"ABCDE7.eml": None, "ABCDE8.eml": None}, "list")],      # so it stays
        }[name.replace("_copied", "")]

    def act(self, name, spool, promised):
        """All steps, up to the first error.  In a story that ends in _copied links do not exist."""
        no_links = mock.patch.object(etrn.os, "link", side_effect=OSError(errno.EPERM, "not permitted"))
        with no_links if name.endswith("_copied") else contextlib.nullcontext():
            try:
                if name in self.OPENING:
                    spool.open()
                for changes, what, *values in self.steps(name):
                    for key, new in changes.items():
                        promised[key] = [*promised.get(key, [None]), new]
                    result, groups = getattr(spool, what)(*values), [[*changes]]
                    errors = [OSError(0, "not healed") if what == "heal" and not result else None]
                    if what in ("commit", "remove"):
                        errors, groups = result, [[its["id"] for its in one[2]] if what == "commit" else [one]
                                                  for one in values[0]]
                    for keys, error in zip(groups, errors):
                        promised.update({key: [changes[key]] for key in keys if error is None})
                    if any(errors):
                        return next(filter(None, errors))
            except OSError as error:
                return error
        return None

    # -- and what came of it

    @contextlib.contextmanager
    def on(self, platter):
        lock = types.SimpleNamespace(LOCK_EX=2, LOCK_SH=1, LOCK_NB=4, LOCK_UN=8, flock=lambda fd, how: None)
        with mock.patch.object(etrn, "os", platter), mock.patch.object(etrn, "fcntl", lock):
            yield

    def spool_for(self, name):
        return etrn.Spool(self.SPOOL) if name in self.OPENING else opened(self.SPOOL)

    def files_of(self, state):
        begin = self.SPOOL + "/"
        return {path[len(begin):]: data for path, data in state.items() if path.startswith(begin)}

    def check(self, state, promised, is_killed=False):
        """Start on what is left, and compare.  After a mere kill no half of a pair is there to explain."""
        self.state = {path: data and data[:60] for path, data in state.items()}, promised
        files = self.files_of(state)
        platter = Platter(state, 2 * etrn.ORPHAN_S)
        with self.on(platter), contextlib.closing(opened(self.SPOOL)) as spool:
            found = {id: seen(*one) for id, one in start(spool).items() if is_killed or type(one) is tuple}
        self.assertEqual(platter.files, {})
        corrupt = {name[8:14] for name in self.files_of(platter.killed()) if name.startswith("corrupt/")}
        self.assertTrue(not is_killed or corrupt == {key[:6] for key in promised if "aside" in key}, corrupt)
        for key in {**found, **promised}:
            name = key.partition(" ")[0]
            file = files.get(name, files.get("corrupt/" + name) if "aside" in key else None)
            self.assertIn(file if "." in key else found.get(key), promised.get(key, [None]), key)
        is_told = self.NOTICE in found or self.NOTICE not in promised
        are_old = all(found.get(id) == seen(sidecar) for id, sidecar in self.two.items())
        self.assertTrue(is_told or are_old, "marked or removed before its sender is told")

    def cut(self, name, most=48, fault=lambda number, name: 0):
        """Before and after each step."""
        platter, promised = self.platter_for(name)
        found = {}

        def look():
            now = {key: list(its) for key, its in promised.items()}
            for is_killed, states in ((True, [platter.killed()]), (False, platter.states(self.chance, most))):
                for one in states:
                    found.setdefault((frozenset(one.items()), repr(now), is_killed), (one, now, is_killed))
        with self.on(platter):
            spool = self.spool_for(name)
            platter.on_step, platter.fault = look, fault
            self.result = self.act(name, spool, promised)
            look()
        for state, then, is_killed in found.values():
            self.check(state, then, is_killed)
        self.assertGreater(len(found), 4)
        return platter

    def cut_each(self, names, most=48):
        for name in cases(self, names):
            platter = self.cut(name, most)
            self.assertIsNone(self.result)
            left = [one for one in self.files_of(platter.killed()) if one.startswith(("incoming", "done"))]
            self.assertEqual(left, ["incoming"])

    def test_while_mail_is_accepted_or_changes_or_leaves(self):
        self.cut_each(["accept", *self.CHANGING])
        self.cut_each(["batch", "several", "several_copied"], 16)

    def test_while_a_start_removes_all_that_crashes_leave_and_an_old_spool_is_taken_over(self):
        self.cut_each(self.OPENING, 16)

    def test_a_message_whose_names_cannot_be_synced(self):
        """It is withdrawn; and stays whole where that cannot be done."""
        for hits in cases(self, [[("fsync", 2)], [("fsync", 2), ("rename", 3)]]):
            names = []

            def fault(number, name, names=names, hits=hits):
                names.append(name)
                return errno.EIO if (name, names.count("rename")) in hits else 0
            platter = self.cut("accept", 48, fault)
            left = [name for name in self.files_of(platter.killed()) if "ABCDE5" in name]
            self.assertEqual((self.result.errno, len(left)), (errno.EIO, 2 * len(hits) - 2))

    # -- failing calls

    ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE)

    def test_with_a_failing_call_nothing_is_lost_but_its_own_story(self):
        self.fail_each([*itertools.product(["accept"], self.ERRORS, [False]), ("remove", errno.ENOSPC, True),
                        *itertools.product(self.NAMES, [errno.EIO], (False, True))])

    @long_run
    def test_with_every_call_failing_in_every_way_nothing_is_lost_but_its_own_story(self):
        self.fail_each(itertools.product(self.NAMES, self.ERRORS, (False, True)), 99)

    def fail_each(self, rows, most=5):
        """For each story, errno, and whether it lasts: fail at the first step, at the second, and so on."""
        failed, found = 0, {}
        for name, code, is_lasting in cases(self, rows):
            for at in itertools.count():
                platter, promised = self.platter_for(name)
                with self.on(platter):
                    spool = self.spool_for(name)
                    first = platter.count + at
                    hit = range(first, 1 << 30 if is_lasting else first + 1)
                    platter.fault = lambda number, _, hit=hit, code=code: code if number in hit else 0
                    error = self.act(name, spool, promised)
                    is_over = platter.count <= first            # the story has no such step
                    platter.fault = lambda number, _: 0
                    if error is not None:
                        failed += 1
                        self.assertIn(error.errno, (code, 0))
                        if name in self.ACCEPTING and not is_lasting:
                            refused = [id for id, its in promised.items() if None in its]
                            left = [path for path in platter.killed() for id in refused if id in path]
                            self.assertEqual(left, [])
                    if name not in self.OPENING:                # well again, and good for another
                        self.assertTrue(spool.heal())
                        self.assertIsNone(store(spool, "ABCDE4"))
                        promised["ABCDE4"] = [seen(sidecar_of("ABCDE4"))]
                    spool.close()
                    self.assertEqual(platter.files, {}, "left open")
                if name == "begin":                             # what is left goes with the next start
                    promised = {key: its for key, its in promised.items() if "." not in key}
                states = list(platter.states(self.chance, 1)) if name != "set_aside" else []     # asked again
                for state in [platter.killed(), *self.chance.sample(states, min(most, len(states)))]:
                    found.setdefault((frozenset(state.items()), repr(promised)), (state, promised))
                if is_over:
                    break
        for state, promised in found.values():
            self.check(state, promised)
        self.assertGreater(failed, 100)

    def test_errors_that_linux_tells_once_or_late_are_not_swallowed(self):
        """Of a folder: only to those who opened it before.  XFS that is down: by fstat() alone."""
        for is_down in cases(self, [False, True]):
            platter, promised = self.platter_for("accept")
            real, names, early = platter.fsync, [], []

            def fault(number, name, names=names, is_down=is_down):
                names.append(name)
                if name == "rename":
                    early[:] = platter.files            # noqa: B023
                return errno.EIO if is_down and name == "stat" and names[-2] == "fsync" else 0

            def fsync(fd, names=names, is_down=is_down):
                real(fd)                                # noqa: B023
                if not is_down and fd in early:         # noqa: B023
                    raise OSError(errno.EIO, "what was renamed could not be written")
            with self.on(platter), mock.patch.object(platter, "fsync", fsync):
                spool = self.spool_for("accept")
                platter.fault = fault
                self.assertIsInstance(self.act("accept", spool, promised), OSError)


class SpoolPeople(Folder):
    """What people do to a directory, what other programs left in it, and what version 0.1 did."""

    def setUp(self):
        super().setUp()
        self.path = self.path("spool")
        self.spool = opened(self.path)
        self.addCleanup(lambda: self.spool.close())
        self.assertIsNone(store(self.spool, "ABCDE0"))

    def at(self, name):
        return os.path.join(self.path, name)

    def put(self, **files):
        write_files(self.path, files)

    def tree(self):
        """Names that look like ours."""
        return sorted(os.path.join(at, name)[len(self.path) + 1:] for at, folders, names in os.walk(self.path)
                      for name in folders + names if "." in name)

    def restart(self):
        self.spool.close()
        self.spool = opened(self.path)
        return start(self.spool)

    def found(self, id):
        """However it is read."""
        try:
            looked = self.spool.look(id, "whole")
        except (etrn.Corrupt, etrn.NotOurs, OSError) as error:
            looked = error
        return [*self.spool.load([id]), *self.spool.read([id]), looked]

    def failing(self, code, **calls):
        """Of os, for these names or (where there are none) always."""
        def call(names, real, first, *rest, **options):
            if not names or first in names:
                raise OSError(code, os.strerror(code))
            return real(first, *rest, **options)
        return mock.patch.multiple(etrn.os, **{
            name: functools.partial(call, its, getattr(os, name)) for name, its in calls.items()})

    def test_files_of_others_are_left_alone_and_odd_things_do_not_keep_it_from_starting(self):
        for name in ("README.txt", "notes.json", "abc.eml", "A.eml", "ABCDEF.txt"):
            self.put(**{name: b"x", "incoming/" + name: b"x"})
        for folder, name in itertools.product(("incoming/", "done/"), ("ABCDE0.json/x", "ABCDE8.eml/x")):
            os.makedirs(self.at(folder + name))
        before = self.tree()
        self.assertEqual((list(self.restart()), self.tree()), (["ABCDE0"], before))

    def test_what_is_no_file_or_makes_no_sense_is_set_aside_and_does_not_stop_the_rest(self):
        for name in ("ABCDE5", "ABCDE6", "ABCDE8"):
            self.assertIsNone(store(self.spool, name))
            os.unlink(self.at(name + ".eml"))
        self.put(**{"ABCDE2.json": None, "ABCDE5.eml": None, "ABCDE7.json": b"{", "corrupt/ABCDE7.json": b""})
        os.mkfifo(self.at("ABCDE1.json"))           # waited for by nobody
        os.mkfifo(self.at("ABCDE6.eml"))
        os.symlink("ABCDE3.json", self.at("ABCDE3.json"))
        os.symlink("nowhere", self.at("ABCDE4.json"))
        for id in cases(self, ["ABCDE%d" % number for number in range(1, 9)]):
            self.assertEqual({isinstance(one, etrn.Corrupt) for one in self.found(id)}, {True})
        self.assertEqual((list(self.restart()), self.spool.count_corrupt()), (["ABCDE0"], 9))
        shutil.rmtree(self.at("corrupt"))           # people tidy up
        self.assertIn("moved to corrupt/: ABCDE0.json ABCDE0.eml", self.spool.set_aside("ABCDE0", "why"))
        self.assertIn("nothing left of it", self.spool.set_aside("ABCDE0", "why"))

    def test_a_body_that_does_not_match_its_sha256_is_not_sent(self):
        large = MESSAGE * 9000
        for body, bad in cases(self, [(MESSAGE, MESSAGE[:-1] + b"X"), (MESSAGE, MESSAGE + b"X"),
                                      (MESSAGE, MESSAGE[:-1]), (MESSAGE, b""), (large, large[:-1] + b"X")]):
            self.assertIsNone(store(self.spool, "ABCDEF", body))
            self.assertEqual(self.found("ABCDEF")[2][1], body)
            self.put(**{"ABCDEF.eml": bad})
            self.assertEqual({type(one) for one in self.found("ABCDEF")[1:]}, {etrn.Corrupt})
            self.assertEqual(self.spool.remove(["ABCDEF"]), [None])

    def test_what_may_not_be_read_or_is_newer_or_is_not_given_by_the_disk_stays_where_it_is(self):
        for number, version in enumerate((2, 2, 3, 99)):
            self.put(**pair(sidecar_of("ABCDF%d" % number, format=version)))
        before = self.tree()
        with self.failing(errno.EACCES, open=("ABCDF0.json", "ABCDF1.eml")):        # root may read all
            for number in cases(self, range(4)):
                self.assertEqual({type(one) for one in self.found("ABCDF%d" % number)}, {etrn.NotOurs})
            self.assertEqual([id for id, one in self.restart().items() if isinstance(one, tuple)], ["ABCDE0"])
        for code in cases(self, [errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM]):
            with self.failing(code, open=("ABCDE0.eml",)):
                self.assertEqual({getattr(one, "errno", 0) for one in self.found("ABCDE0")}, {code})
                start(self.spool)
        self.assertEqual(self.tree(), before)

    def test_a_queue_id_in_use_is_not_taken_again(self):
        self.put(**{"ABCDE1.eml": MESSAGE})
        both = [sidecar_of("ABCDE2"), sidecar_of("ABCDE0", ["u@two.example"])]
        for error in cases(self, [store(self.spool, "ABCDE0", b"new"), store(self.spool, "ABCDE1", b"new"),
                                  *self.spool.commit([("ABCDE2", b"new", both)])]):
            self.assertEqual(getattr(error, "errno", None), errno.EEXIST)
        self.assertEqual((recover(self.spool), os.listdir(self.at("incoming"))), ({"ABCDE0": MESSAGE}, []))

    def test_a_start_needs_no_space_and_no_right_to_the_folder_above(self):
        self.spool.close()
        full = self.failing(errno.ENOSPC, write=(), pwrite=(), ftruncate=())
        with self.failing(errno.EACCES, open=(self.folder,)), full:
            self.assertEqual(list(self.restart()), ["ABCDE0"])

    def test_a_spool_that_was_unmounted_or_moved_takes_nothing_and_loses_nothing(self):
        os.rename(self.path, self.path + ".away")
        for is_there in cases(self, [False, True]):
            if is_there:
                os.makedirs(self.at("incoming"))            # as if it were the folder below the mount point
            self.assertIn(getattr(store(self.spool, "ABCDE1"), "errno", 0), etrn._SICK)
            self.assertFalse(self.spool.heal())
            self.assertEqual(recover(self.spool), {"ABCDE0": MESSAGE})      # what is here still leaves
        self.assertEqual(os.listdir(self.at("incoming")), [])
        shutil.rmtree(self.path)
        os.rename(self.path + ".away", self.path)
        for folder in cases(self, ["incoming", "corrupt"]):
            shutil.rmtree(self.at(folder))                  # or somebody took a part of it
            self.assertEqual(store(self.spool, "ABCDE2") is not None, folder == "incoming")
            self.assertTrue(self.spool.heal())
            self.assertIsNone(store(self.spool, "ABCDE1"))
            self.assertEqual(self.spool.remove(["ABCDE1", "ABCDE2"]), [None, None])
        self.assertEqual(recover(self.spool), {"ABCDE0": MESSAGE})

    def test_a_full_disk_does_not_keep_what_was_delivered(self):
        for code, is_gone in cases(self, [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False)]):
            self.assertIsNone(store(self.spool, "ABCDE1"))
            with self.failing(code, rename=()):
                self.assertEqual(self.spool.remove(["ABCDE1"]) == [None], is_gone)
            self.assertEqual("ABCDE1" in recover(self.spool), not is_gone)

    def test_several_destinations_share_a_body_and_leave_one_by_one_and_nothing_stays(self):
        self.assertEqual({os.stat(self.at(name)).st_mode & 0o77 for name in [*self.tree(), "lock"]}, {0})
        sidecars = [sidecar_of("ABCDF%d" % number, ["u@d%d.example" % number]) for number in range(3)]
        for links, missing in cases(self, [(3, {}), (1, {"link": ()})]):
            with self.failing(errno.EPERM, **missing) if missing else contextlib.nullcontext():
                self.assertEqual(self.spool.commit([("ABCDF0", MESSAGE, sidecars)]), [None])
            self.assertEqual(os.stat(self.at("ABCDF0.eml")).st_nlink, links)
            for number in range(3):
                self.assertEqual(len(recover(self.spool)), 4 - number)
                self.assertEqual(self.spool.remove(["ABCDF%d" % number]), [None])
        self.assertEqual((self.spool.remove(["ABCDE0", "ABCDE7"]), self.tree()), ([None, None], []))

    def test_the_spool_has_one_owner_and_a_command_is_waited_for(self):
        beside = etrn.Spool(self.path)
        for name, is_relay in cases(self, [(str(os.getpid()), True), ("command", False)]):
            self.spool.close()
            self.spool.open(is_relay)
            ticks = mock.Mock(side_effect=itertools.count())
            with mock.patch.multiple(time, sleep=mock.DEFAULT, monotonic=ticks) as mocks:
                self.assertRaisesRegex(etrn.SpoolBusy, name, beside.open)
            self.assertEqual(mocks["sleep"].called, not is_relay)       # a relay ends when it ends
            beside.close()
        with mock.patch.object(time, "sleep", lambda seconds: self.spool.close()):
            beside.open()
        beside.close()
        self.spool.open()

    # -- what others wrote

    NASTY = [None, True, False, 0, -1, 5, 1e308, -0.5, float("nan"), float("inf"), 10 ** 30,
                        10 ** 400, "", "x", "a b", "x\r\ny", "\ud800", "a@b@c", "\0", [], [None], ["x"], {}]

    @classmethod
    def variants(cls, good):
        """The same with any one value changed or missing."""
        def places(value, path=()):
            for key in value if type(value) is dict else range(len(value)) if type(value) is list else ():
                yield (*path, key)
                yield from places(value[key], (*path, key))
        for *path, last in places(good):
            for nasty in [*cls.NASTY, ...]:
                changed = target = json.loads(json.dumps(good))
                for key in path:
                    target = target[key]
                target[last] = nasty
                if nasty is ...:
                    del target[last]
                yield changed

    def test_a_sidecar_nested_too_deep_to_be_passed_on_is_corrupt(self):
        good = json.dumps(sidecar_of("ABCDE1", sha256="0" * 64))[:-1].encode()
        for depth in cases(self, range(100, 12000, 100)):
            with contextlib.suppress(etrn.Corrupt):
                data = good + b', "x": ' + b"[" * depth + b"]" * depth + b"}"
                etrn.pack([(1, [(etrn.parse_sidecar(data, "ABCDE1")[0], b"")])])

    def test_a_sidecar_either_makes_sense_or_is_corrupt(self):
        """Nothing that passes makes anything fail later."""
        good = sidecar_of("ABCDE1", [USER, OTHER], ret="HDRS", envid="x+20y", sha256="0" * 64)
        person = good["recipients"][1]
        person.update(attempts=3, last_attempt=good["received"], last_status="4.2.0", last_response="450 no",
                      last_remote="m.example", refused_since=5.0, notify="NEVER", orcpt="rfc822;x")
        old = old_sidecar("ABCDE1", [USER, "u@two.example"], ["two.example"], sha256="0" * 64)
        junk = [b"", b"{", b"[]", b"5", b"\xff", b"\0", b"[" * 99999, b'{"format": 1}', b'{"format": 2}']
        junk += [json.dumps(dict(good, **change)).encode() for change in (
            {"format": 1}, {"sender": "a@b.example>\r\nRCPT TO:<v@o.example"}, {"domain": "other.example"},
            {"recipients": [dict(person, address="u@%s> X" % DOMAIN)]},
            {"recipients": [dict(person, state="sent")]})]
        rest = [json.dumps(one).encode() for one in (good, old, *self.variants(good), *self.variants(old))]
        passed = 0
        for data in cases(self, junk + rest):
            try:
                parts = etrn.parse_sidecar(data, "ABCDE1")
            except (etrn.Corrupt, etrn.NotOurs) as error:
                self.assertNotIn("\n", str(error))
                continue
            passed += 1
            self.assertNotIn(data, junk)
            for one in parts:
                self.assertIn(etrn.summarize(one).domain, (DOMAIN, "two.example"))
                etrn.format_sidecar(one)
                etrn.format_envelope(one, b"Subject: x\r\n", 1764000000.0)
                states = {person["state"] for person in one["recipients"]}      # of another it would be lost
                self.assertLessEqual(states, {"queued", "delivered", "bounced", "expired", "deleted"})
                judged = [etrn.Verdict(person["address"], "bounced", "5.1.1", person["last_response"],
                                       person["last_remote"]) for person in one["recipients"]]
                for action in ("failed", "delayed", "relayed"):
                    etrn.format_notice("h.example", "a@b.example", one, action, judged, b"", False, 5, "", "")
        self.assertIn(passed, range(60, len(rest) // 5))
        for data in cases(self, junk):
            self.put(**{"ABCDE0.json": data, "state.json": data})
            with contextlib.suppress(etrn.Corrupt):
                self.spool.peek_sidecar("ABCDE0")
            self.assertIsInstance(self.spool.load_state("state.json"), dict)

    def test_a_sidecar_of_as_many_as_a_message_may_have_can_be_read_again(self):
        people = ["%s%d@%s" % ("x" * 200, number, DOMAIN) for number in range(50000)]       # max_recipients
        self.assertIsNone(store(self.spool, "ABCDE1", recipients=people))
        self.assertIsInstance(self.spool.load(["ABCDE1"])[0], list)

    def test_a_clock_that_was_set_changes_all_times_of_a_message(self):
        times = ("expires", "next_attempt", "last_attempt", "refused_since")
        self.spool.record("ABCDE0", {}, {USER: {"last_attempt": 5.0, "refused_since": 6.0}})
        before = self.spool.read_sidecar("ABCDE0")
        self.spool.shift(["ABCDE9", "ABCDE0"], 1000.0)      # the first was delivered meanwhile
        before["recipients"][0].update((key, before["recipients"][0][key] + 1000.0) for key in times)
        before["received"] += 1000.0
        self.assertEqual(self.spool.read_sidecar("ABCDE0"), before)

    def test_a_message_of_version_0_1_becomes_one_for_each_domain(self):
        people = ["a@one.example", "b@two.example", "c@two.example", "d@gone.example"]
        for kind, held, is_held in cases(self, [
                ("mail", ["two.example"], (False, True)), ("mail", [], (False, False)),
                ("notice", ["notice:"], (True, True))]):
            old = old_sidecar("ABCDE1", people, held, kind=kind, envid="e", ret="FULL")
            old["recipients"][3]["state"] = etrn.DELIVERED
            old["recipients"][2].update(attempts=7, last_response="450 no", delayed=True)
            self.put(**pair(old))
            found, = self.spool.load(["ABCDE1"])
            self.assertEqual(self.spool.convert("ABCDE1"), found)
            self.assertEqual([(one.id, one.attempts, one.is_delay_told) for one in found],
                             [("ABCDE1", 0, False), ("ABCDE101", 7, True)])
            for number, (sidecar, data) in enumerate(self.spool.read(["ABCDE1", "ABCDE101"])):
                domain = people[number].partition("@")[2]
                self.assertEqual(data, MESSAGE)
                kept = {key: sidecar[key] for key in ("size", "sha256", "recipients")}
                self.assertEqual(sidecar, {**old, **kept, "format": 2, "domain": domain,
                                           "id": found[number].id, "held": is_held[number]})
                self.assertEqual([{**person, "domain": domain} for person in sidecar["recipients"]],
                                 [person for person in old["recipients"] if person["domain"] == domain])
            self.assertEqual(self.spool.remove(["ABCDE1", "ABCDE101"]), [None, None])
        self.put(**pair(old_sidecar("A" * 20, ["u@d%d.example" % number for number in range(300)])))
        self.spool.convert("A" * 20)
        self.assertEqual(len(self.restart()), 301)


class SpoolWork(Folder):
    """What is done as one batch, and the process that does it."""

    def setUp(self):
        super().setUp()
        self.spool = opened(self.path("spool"))
        self.addCleanup(self.spool.close)

    def work(self, *questions):
        """As one batch; what each asker hears, in the order in which they asked."""
        told = etrn.do_batch(self.spool, [(number, one[0], one[1:]) for number, one in enumerate(questions)])
        self.assertEqual(sorted(number for number, _ in told), list(range(len(questions))))
        return [result for _, result in sorted(told, key=lambda one: one[0])]

    def commit(self, id):
        return "commit", id, MESSAGE, [sidecar_of(id)]

    def test_nothing_overtakes_what_was_asked_of_the_same_message(self):
        one, keep, remove = "ABCDE1", self.commit("ABCDE1"), ("remove", "ABCDE1")
        hold, let_go = (("record", one, {"held": held}, {}) for held in (True, False))
        for questions, left, is_held in cases(self, [
                ([keep, hold], [one], True), ([keep, self.commit("ABCDE2"), remove], ["ABCDE2"], False),
                ([("append", one, b"x"), ("discard", one), keep], [one], False),
                ([keep, remove, keep], [one], False),
                ([keep, hold, let_go, remove, keep, hold, ("shift", [one], 1e9)], [one], True),
                ([keep, hold, let_go, ("set_aside", one, "why")], [], None)]):
            self.assertEqual([error for error in self.work(*questions) if isinstance(error, Exception)], [])
            self.assertEqual([(id, sidecar["held"], sidecar["received"] > time.time() + 9e8)
                              for id, (sidecar, _) in start(self.spool).items()],
                             [(id, is_held, len(questions) == 7) for id in left])
            self.spool.remove(left)

    def test_a_batch_is_written_then_synced_then_entered_and_shares_its_last_fsync(self):
        platter, steps = Platter({"/var": None, "/var/spool": None}), []
        with PowerCuts.on(self, platter):
            self.spool = spool = opened(PowerCuts.SPOOL)
            quiet = ("open", "stat", "fstatvfs", "close")
            platter.fault = lambda number, name: name not in quiet and steps.append(name)
            for act, result, expected in cases(self, [
                    (lambda: self.work(*map(self.commit, ("ABCDE1", "ABCDE2", "ABCDE3"))), [None] * 3,
                     ["write", "posix_fadvise"] * 6 + ["fsync"] * 6 + ["rename"] * 6 + ["fsync"]),
                    (lambda: self.work(("remove", "ABCDE1"), ("remove", "ABCDE2")), [None] * 2,
                     ["rename"] * 2 + ["fsync"] + ["unlink"] * 4),
                    (spool.heal, True, "mkdir mkdir unlink write fsync rename fsync unlink fsync".split())]):
                steps.clear()
                self.assertEqual(act(), result)
                self.assertEqual(steps, expected)

    def test_where_an_fsync_takes_long_many_are_under_way_at_once(self):
        """And each message has its own luck.  The kernel need not take advice."""
        together, real = threading.Barrier(8), os.fsync

        def fsync(fd):
            if os.fstat(fd).st_size == 5:
                raise OSError(errno.EIO, "I/O error")
            if stat.S_ISREG(os.fstat(fd).st_mode):
                together.wait(DEADLINE_S)
            real(fd)
        ids = ["ABCDE%d" % number for number in range(5)]
        self.spool.fsync_s = 1.0
        with mock.patch.object(etrn.os, "fsync", fsync), mock.patch.object(
                etrn.os, "posix_fadvise", side_effect=OSError(errno.EINVAL, "Invalid argument")):
            batch = [(id, MESSAGE, [sidecar_of(id)]) for id in ids[:4]]
            errors = self.spool.commit([*batch, (ids[4], b"wrong", [])])
        self.assertEqual([error and error.errno for error in errors], [None] * 4 + [errno.EIO])
        self.assertEqual(list(recover(self.spool)), ids[:4])

    def test_a_bug_is_told_to_who_asked(self):
        for broken in cases(self, ["commit", "remove", "heal"]):
            with mock.patch.object(self.spool, broken, side_effect=RuntimeError("a bug")):
                told = self.work(self.commit("ABCDE1"), ("remove", "ABCDE7"), ("heal",))
            self.assertEqual([isinstance(one, RuntimeError) for one in told],
                             [one == broken for one in ("commit", "remove", "heal")])
            self.spool.remove(["ABCDE1"])


# == 7. PROOF ==================================================================
# Whether the tests above would notice: each fsync of the spool deleted, orders swapped, checks dropped.

# name :: text of the source => what to put there; SWAPPED: the line with that text and the one before it
MUTANTS = r"""
a sidecar enters before its body :: self._rename("incoming/%s.json" % sidecar["id"] => SWAPPED
names are synced before they enter :: nullcontext(): => nullcontext(): pass\n            if True:
nothing of a batch is synced :: for id, problem in zip(owners, self._sync(fds)): => for id, problem in []:
a copied body is not synced :: write_all(fds[-1], block)\n => \
write_all(fds[-1], block)\n            fds.pop()\n
a body leaves first :: results[id] = self._take => self._unlink(id + ".eml"); results[id] = self._take
a finished sidecar leaves before its body :: self._unlink("incoming/%s.json" % id)\n => SWAPPED
a failed removal goes on :: return [results.get(id) or error for id in ids] => pass
a notice is made again :: if not self.has(own + ".json") else None => if True else None
a notice whose message left is forgotten :: self.queue.loader.load([own for own => ([own for own
a cause is marked before its notice is made :: for own, data, its in notices:\n            error => \
notices and self.record(id, changes, people)\n        for own, data, its in notices:\n            error
a sidecar is unlinked first :: _rename(temporary, name) => _unlink(name); self._rename(temporary, name)
a start takes any finished body :: if kind == "json" and not self.has( => if kind == "json" or self.has(
a start leaves a finished body :: if kind == "json" and not self.has( => if False and self.has(
a failed commit stays :: (self._withdraw if id in entered else self.discard)(sidecar["id"]) => pass
a failed commit takes what has its ID :: self._withdraw if id in entered else self.discard => self._withdraw
a failed commit leaves its body :: self._rename(id + ".json", "incoming/%s.json" % id)\n        w => \
pass\n        w
a commit that cannot be undone is torn :: if not self.has(id + ".json"): => if True:
a failed commit is acknowledged :: errors[id] = errors[id] or error\n => pass\n
what cannot be written is acknowledged :: errors[id] = error\n => errors[id] = None\n
what cannot be synced is acknowledged :: errors[id] = errors[id] or problem => pass
short writes are taken for whole ones :: while done < len(data): => while False:
a folder is opened after its changes :: yield\n            os.fsync(fd) => \
yield; new = os.open(folder, os.O_RDONLY, dir_fd=self.root); os.close(fd); fd = new\n            os.fsync(fd)
XFS is believed after it shut down :: os.fstat(fd)      => pass
an lstat that fails is an absence :: except FileNotFoundError:\n            return False => \
except OSError:\n            return False
a queue ID in use is taken again :: if self.has(id + ".json") or self.has(id + ".eml"): => if False:
a body of any octets is sent :: digest.hexdigest() != sidecar["sha256"]: => False:
a sick spool heals by itself :: ("probe")\n        except OSError => ("probe")\n        except ()
a corrupt pair is deleted :: self._rename(id + kind, "corrupt/%s%s" % (name, kind)) => self._unlink(id + kind)
a deferral is insisted on :: len(deferred) < len(judged)) => True)
a full disk keeps delivered mail :: if error.errno != errno.ENOENT and error.errno not in _FULL: => if True:
a part enters before its body :: "json"):\n            with self._ => "json")[::-1]:\n            with self._
an old message changes before its parts :: \
        try:\n            for part in fresh => \
        self._replace(id + ".json", "incoming/%s.new" % id, format_sidecar(parts[0]))\n\
        try:\n            for part in fresh
a batch asks of one message in any order :: if ids and (what == "shift" or values and values[0] in ids) => \
if False
a relay does not wait for a command :: if (holder.isdigit() and is_alive(int(holder))) or => if True or
"""
WITHOUT_FSYNC = [(r"os\.fsync\(\S+", "pass"), (r"self\._durable\(\) if ready else ", ""),
                 (r"with self\._durable\(\):", "if True:"), (r"with self\._durable\(\), ", "with "),
                 (r', self\._durable\("corrupt"\)', "")]


class Mutations(unittest.TestCase):
    """Each must make a test fail."""

    WATCHERS = ("SpoolWork", "PowerCuts", "Recording", "SpoolPeople")

    def mutants(self):
        """Names and sources."""
        source = load(SOURCE)
        lines, end = source.splitlines(True), source[:source.index("# == 8. SESSION")].count("\n")
        for at in range(source[:source.index("# == 7. SPOOL")].count("\n"), end):
            for pattern, instead in WITHOUT_FSYNC:
                line = re.sub(pattern, instead, lines[at])
                if line != lines[at]:
                    changed = "".join([*lines[:at], line, *lines[at + 1:]])
                    yield "line %d: %s" % (at + 1, line.strip()), changed
        for row in MUTANTS.replace("\\\n", "").strip().split("\n"):
            name, old, new = re.split(" :: | => ", row.replace("\\n", "\n"))
            self.assertEqual(source.count(old), 1, name)
            if new == "SWAPPED":
                at = source[:source.index(old)].count("\n")
                yield name, "".join(lines[:at - 1] + [lines[at], lines[at - 1]] + lines[at + 1:])
            else:
                yield name, source.replace(old, new)

    def test_each_mutation_finds_its_place(self):
        self.assertGreater(sum(name.startswith("line ") for name, _ in self.mutants()), 11)

    @long_run
    def test_each_mutation_is_noticed(self):
        loader = unittest.TestLoader()
        tests = [test for name in self.WATCHERS for test in loader.loadTestsFromTestCase(globals()[name])
                 if not getattr(getattr(test, test._testMethodName), "is_long", False)]
        quick_first, missed = sorted(tests, key=self.seconds), []
        for name, source in self.mutants():
            mutant = types.ModuleType("etrn_mutant")
            mutant.__file__, sys.modules["etrn_mutant"] = SOURCE, mutant        # dataclasses look there
            exec(compile(source, "etrn_mutant", "exec"), vars(mutant))
            with mock.patch.object(sys.modules[__name__], "etrn", mutant):
                noticed = next((test for test in quick_first if not self.passes(test)), None)
            failed = noticed.id().partition(".")[2] if noticed else ""
            print("%-50.50s %s" % (name, failed or "SURVIVED"), file=sys.stderr, flush=True)
            missed += [name] * (not failed)
        self.assertEqual(missed, [])

    def seconds(self, test):
        """What it takes without any mutation; it passes then."""
        began = time.monotonic()
        self.assertTrue(self.passes(test), test.id())
        return time.monotonic() - began

    def passes(self, test):
        result = unittest.TestResult()
        with contextlib.redirect_stderr(io.StringIO()):
            copy.copy(test).run(result)
        return result.wasSuccessful()


# == 8. SCHEDULE ===============================================================

class Clock:
    """Both clocks.  advance() moves them together."""

    def __init__(self):
        self.mono, self.wall = 1000.0, 1764000000.0

    @property
    def now(self):
        return etrn.Now(self.mono, self.wall)

    def advance(self, seconds=0, hours=0, days=0):
        step = seconds + 3600 * hours + 86400 * days
        self.mono, self.wall = self.mono + step, self.wall + step
        return self.now


class Schedule(unittest.TestCase):
    """A destination alone; its stories are told in Recovery, with all that is around it."""

    def setUp(self):
        self.clock = Clock()

    def begin(self, domain="", state="UNKNOWN"):
        one = etrn.Destination(DOMAIN, config("", domain).domain(DOMAIN), self.clock.now)
        one.add(etrn.Entry("A00", 100, self.clock.wall), self.clock.now)
        one.state = etrn.Primary[state]
        return one

    def test_what_is_given_back_goes_oldest_first_however_it_comes_back(self):
        one, now = self.begin(), self.clock.now
        for number in range(1, 9):
            one.add(etrn.Entry("A0%d" % number, 100, self.clock.wall + number), now)
        one.is_proven = True
        for numbers in cases(self, [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1], [7, 1]]):
            taken = {entry.id: entry for entry in one.take(8, now)}
            for way in (lambda entries: one.give_back(*entries),
                        lambda entries: [one.give_back(entry) for entry in entries]):
                way([taken.pop("A0%d" % number) for number in numbers])
                back = one.take(len(numbers), now)
                self.assertEqual([int(entry.id[1:]) for entry in back], sorted(numbers))
                taken.update((entry.id, entry) for entry in back)
            one.give_back(*taken.values())

    def test_names_and_homes(self):
        sections = "primary = %s\n[domain .w.example]\nprimary = etrn\n[domain x.example]\nlifetime = %s"
        known, now = etrn.Destinations(config("", sections % ("etrn", "7d"))), self.clock.now
        one, two, other = (known.get(name, now) for name in (DOMAIN, "a.w.example", "x.example"))
        for name, moved in cases(self, [("a.w.example", ["a.w.example"]), ("b.w.example", []),
                                        (DOMAIN, [DOMAIN])]):
            found = known.move(known.config_of(name), "192.0.2.9", now)         # as an ETRN says
            self.assertEqual([one.name for one in found], moved)
        later = known.get("b.w.example", now)
        self.assertEqual([one.home for one in (one, two, later, other)], ["192.0.2.9"] * 3 + [""])
        other.add(etrn.Entry("A00", 100, self.clock.wall), now)
        other.failures = etrn.ATTEMPTS_MIN
        for lifetime, expired in (("7d", 0), ("1d", 1)):        # new lifetimes hold for queued mail
            known.reconfigure(config("", sections % ("atrn", lifetime)), self.clock.advance(days=1))
            self.assertEqual(len(other.look(self.clock.now)[0]), expired)
        self.assertEqual([bool(one.waits_for) for one in (one, other)], [True, False])
        known = etrn.Destinations(etrn.parse_config(
            "[relay]\ndomains = example.com, a.example.com, badexample.com, .w.example, x.y.example", "/x/c"))
        for name in ("example.com", "a.example.com", "badexample.com", "b.w.example", "x.y.example"):
            known.get(name, now)
        for what, expected, is_served in cases(self, [      # whole, or on a dot boundary
                ("example.com", "example.com", True), ("@example.com", "a.example.com example.com", True),
                ("@com", "a.example.com badexample.com example.com", True), ("c.w.example", "", True),
                ("@w.example", "b.w.example", True), ("w.example", "", False), ("com", "", False),
                ("xample.com", "", False), ("@xample.com", "", False), ("@y.example", "x.y.example", True),
                ("y.example", "", False), ("b.example.com", "", False), ("@net", "", False)]):
            names = sorted(one.name for one in known.matching(what))
            self.assertEqual((" ".join(names), known.serves(what)), (expected, is_served))

    def test_what_is_known_after_a_restart(self):
        """A route does not outlive the primary that it led to; wrong values cost knowledge, not the start."""
        one = self.begin("primary = mx")
        one.route, one.size_limit = [etrn.Hop("m.example", "192.0.2.1", 25)], 99999
        one.on(etrn.Event.AWAY, self.clock.now, "no route")
        kept = json.loads(json.dumps(one.to_values(self.clock.now)))
        for primary, change, is_known in cases(self, [
                ("mx", {}, True), ("n.example", {}, False), ("mx", {"route": [["192.0.2.1", 25]]}, None),
                ("mx", {"route": [["m.example", "x", 25]]}, None), ("mx", {"since": -1}, None),
                ("mx", {"counters": 5}, None)]):
            one = self.begin("primary = " + primary)
            with contextlib.suppress(TypeError, ValueError, AttributeError):
                one.from_values(dict(kept, **change), self.clock.advance(60))
                self.assertIsNotNone(is_known)
                self.assertEqual((one.state.value, one.last_error), ("down", "no route"))
            self.assertEqual((len(one.route), one.size_limit), (1, 99999) if is_known else (0, 0))


# == 9. DELIVERY ===============================================================
# One connection to a scripted primary, and what it reports of each recipient.

ENDLESS = b"250-and another thing\r\n" * 5000
OVERLONG = b"250 " + b"x" * 200000
GARBAGE = [b"hello\r\n", b"-1 x\r\n", b"850 x\r\n", b"25 x\r\n", b"250x\r\n", b"250-a\r\n550 b\r\n", b"\r\n",
           b"\x00\xff\r\n", b"199 x\r\n", b"600 x\r\n"]
FAULTS = {"4xx": "451 4.3.0 later", "5xx": "554 5.7.1 no", "drop": CUT, "hang": HANG,
          "421": "421 4.3.2 closing",
          "over-long": OVERLONG, "endless": ENDLESS, **{str(one): one for one in GARBAGE}}
HOP = etrn.Hop("primary.example", "192.0.2.1", 25)
WAYS = (["PIPELINING", "8BITMIME", "DSN", "SIZE 1000000"], ["8BITMIME", "SIZE"],
        ["PIPELINING", "CHUNKING", "DSN", "8BITMIME"], ["CHUNKING", "SIZE"])


def make_plan(cfg, primary, **values):
    """What dial() is given; the one place that knows the shape of Plan."""
    return etrn.Plan(DOMAIN, cfg, primary, "backup.example.net", etrn.Resolver(()), (), ())._replace(**values)


class PuppetLoop(etrn.Loop):
    """Without sockets, on a clock that is not real.  What would run in a thread runs at once."""

    def __init__(self, clock):
        self.clock, self.now, self.is_woken = clock, clock.now, True
        self.timers, self.order, self.posted = [], itertools.count(), collections.deque()

    def bug(self, error):
        raise error

    def turn(self, longest=None):
        self.now = self.clock.now
        while self.posted or (self.timers and self.timers[0][0] <= self.now.mono):
            call, values = self.posted.popleft() if self.posted else (heapq.heappop(self.timers)[2], ())
            self.guard(call, *values)

    def in_thread(self, work, then):
        result = work()
        is_slow = str(getattr(result, "error", "")).endswith("timed out")
        self.later(etrn.CONNECT_S if is_slow else 0.0, lambda: then(result))


class Puppet:
    """A Stream without a socket.  `stage`, a Primary or a Simulation, says what its other end says."""

    def __init__(self, loop, stage, on_data, on_end):
        self.loop, self.stage, self.on_data, self.on_end = loop, stage, on_data, on_end
        self.out, self.moved, self.sock, self.came = bytearray(), loop.now.mono, self, b""
        self.on_sent = None
        self.on_closed = lambda: None
        self.is_over = self.is_silent = self.is_pausing = False
        self.is_ahead = False           # a command came before the one before was answered
        self.behind = []   # what had come behind each end of data when that was answered
        self.sender = ""
        self.talk = smtp(stage, self._say, self._on_line, lambda data: self.behind.append(self.came))
        self.want = next(self.talk)
        stage.puppets = [*getattr(stage, "puppets", []), self]

    def getsockname(self):
        return "127.0.0.1", 9

    def send(self, data):
        self.came += data
        self.moved = self.loop.now.mono
        self.loop.post(self._play)
        if self.on_sent is not None:
            self.loop.post(self.on_sent)
            self.on_sent = None

    def finish(self, linger=True):
        self._play()
        self.close()

    def close(self):
        if not self.is_over:
            self.is_over = True
            self.stage.puppets.remove(self)
            self.on_closed()

    def _play(self):
        """Hear what has come, and answer."""
        while not (self.is_silent or self.is_over or self.is_pausing):
            size = self.came.find(b"\n") + 1 or -1 if self.want is None else self.want
            if not 0 <= size <= len(self.came):
                return
            piece, self.came = self.came[:size], self.came[size:]
            self._hear(piece)

    def _hear(self, piece=None):
        self.want = self.talk.send(piece)
        self.is_pausing, self.is_silent = isinstance(self.want, float), self.is_silent or self.want == "QUIT"
        if self.is_pausing:
            self.loop.later(self.want, lambda: self._hear() or self._play())

    def _on_line(self, line):
        self.stage.log.append(line)
        self.is_ahead |= bool(self.came) and line[:4] != "BDAT"

    def _say(self, verb, argument, default, taken=lambda: None):
        self.stage.current = self
        said = self.stage._said(verb, argument, default)
        data = b"" if said in (CUT, HANG) else said if isinstance(said, bytes) else (
            str(said).replace("\n", "\r\n").encode("utf-8") + b"\r\n")
        if data[:1] == b"2":
            taken()
            self.sender = argument.partition("<")[2].partition(">")[0] if verb == "MAIL" else self.sender
        if not self.is_silent:
            self.loop.post(lambda: self.is_over or not data or self.on_data(data))
            self.is_silent = said in (CUT, HANG) or b"\n421" in b"\n" + data
            if self.is_silent and said is not HANG:
                self.loop.post(lambda: self.is_over or self.on_end(""))
        return data[:1].decode("latin-1")


def greeted(stage, extensions):
    """A Dialer that has done its work."""
    offered = {one.partition(" ")[0].lower(): one.partition(" ")[2] for one in extensions}
    return types.SimpleNamespace(
        sock=stage, hop=HOP, esmtp_features=offered, local_hostname="backup.example.net", whole=[],
        replies=etrn.Replies(HOP.host), close=lambda: None)


class Played(Folder):
    """Tests whose primaries are played: Connection talks to a Puppet."""

    def setUp(self):
        super().setUp()
        enter(self, mock.patch.object(etrn, "Stream", Puppet))
        self.clock = Clock()


class Delivery(Played):
    """Exchanges over one connection."""

    def setUp(self):
        super().setUp()
        self.mail = {}

    def put(self, data=MESSAGE, recipients=("user@" + DOMAIN,), **values):
        """A message; recipients may have NOTIFY and ORCPT with them."""
        id = "%X" % (0xABC001 + len(self.mail))
        people = [(one, "", "") if isinstance(one, str) else one for one in recipients]
        client = {"address": "192.0.2.7", "helo": "x", "tls": None}
        sidecar = etrn.make_sidecar(id, "mail", DOMAIN, "a@sender.example", people, 1.0, 9.0, client)
        self.mail[id] = dict(sidecar, size=len(data), **values), data
        return id

    def primary(self, extensions=WAYS[0], **script):
        return enter(self, Primary(extensions=extensions, **script))

    def deliver(self, primary, *ids, one=None, say=None, **options):
        """The first message's verdicts.  Recipients without one go in the next transaction, as in Queue."""
        lines = "\n".join("%s = %s" % item for item in options.items())
        one = self.one = one or etrn.Destination(DOMAIN, config("", lines).domain(DOMAIN), self.clock.now)
        loop, began, left = PuppetLoop(self.clock), self.clock.mono, collections.deque(ids)
        results = self.results = {id: [] for id in ids}
        ends = []

        def ask(then, what, id, offset):
            loop.post(then, self.mail[id][1][offset:offset + etrn.BLOCK_OCTETS])

        def judge(id, verdicts):
            results[id] += verdicts
            is_left = bool(verdicts) and len(results[id]) < len(self.mail[id][0]["recipients"])
            left.extendleft([id] * is_left)

        def feed(connection):
            while left and connection.has_room():
                id = left.popleft()
                sidecar, data = self.mail[id]
                known = {verdict.address for verdict in results[id]}
                people = [person for person in sidecar["recipients"] if person["address"] not in known][:100]
                connection.say(say(connection) if say else etrn.deliver(
                    connection, sidecar, people, data[:etrn.BLOCK_OCTETS], functools.partial(judge, id)))
            if not (left or connection.courses):
                connection.leave()
        connection = self.connection = etrn.Connection(
            one, greeted(primary, primary.extensions), loop, ask, feed, lambda _, error: ends.append(error))
        self.puppet, way = connection.stream, (connection.is_pipelining, connection.is_chunking)
        loop.post(feed, connection)
        while not ends:
            loop.turn()
            self.clock.advance(max(0.001, min([1.0, *(at - self.clock.mono for at, *_ in loop.timers[:1])])))
            loop.now = self.clock.now
            connection.sweep()
        self.seconds, self.error = self.clock.mono - began, ends[0]
        texts = [self.error, *(verdict.response for id in ids for verdict in results[id])]
        self.assertTrue(all(text.isprintable() and len(text) < 1000 for text in texts), texts)
        self.assertTrue(way[1] or not any(self.puppet.behind))      # nothing goes behind a final dot
        self.assertTrue(way[0] or not self.puppet.is_ahead)
        return results[ids[0]]

    def words(self, *ids):
        """What became of each message of one recipient: sent, deferred, refused, untried."""
        return "".join("".join(one.kind[0] for one in self.results[id]) or "u" for id in ids)

    def test_mail_arrives_octet_for_octet(self):
        chance = random.Random(3)
        dots = b"".join(chance.choice([b"\r\n", b".", b"a"]) for _ in range(400)) + b"\r\n"
        for body in cases(self, [MESSAGE, b"", b".\r\n", b"..\r\n.\r\n\r\n.x\r\n", b"\r\n",
                                 b"caf\xe9 \xff\r\n", dots]):
            for way, size in itertools.product(WAYS, (1, 2, 3, 7, 262144)):
                primary = self.primary(way)
                with shorten(BLOCK_OCTETS=size):
                    verdict, = self.deliver(primary, self.put(body))
                self.assertEqual((verdict[1:3], self.error), (("sent", "2.0.0"), ""))
                self.assertEqual(primary.messages, [("a@sender.example", ["user@" + DOMAIN], body)])

    VERDICTS = """
        MAIL 451 4.3.0 x = deferred 4.3.0; MAIL 550 5.7.1 x = refused 5.7.1; MAIL 552 big = refused 5.0.0
        RCPT 450 4.2.0 x = deferred 4.2.0; RCPT 452 4.2.2 x = deferred 4.2.2; RCPT 451 x = deferred 4.0.0
        RCPT 550-5.1.1 x|550 5.1.1 x = refused 5.1.1; RCPT 251 x = sent 2.0.0; RCPT 552 x = deferred 4.5.3
        RCPT 552 5.5.3 x = deferred 4.5.3; RCPT 552 5.2.2 x = refused 5.2.2; DATA 451 4.3.0 x = deferred 4.3.0
        DATA 554 5.7.1 no = refused 5.7.1; . 452 4.3.1 full = deferred 4.3.1; . 550 5.7.1 spam = refused 5.7.1
        . 550 2.0.0 odd = refused 5.0.0; RCPT 550 5.1.1 no|421 bye = refused 5.1.1; QUIT 421 x = sent 2.0.0
        MAIL 354 go on = deferred 4.5.0; RCPT 354 go on = deferred 4.5.0; MAIL 399 x = deferred 4.5.0
        . 334 x = deferred; DATA 250 taken already = deferred; . 354 go = deferred
        """

    def test_verdicts_are_the_primarys_own_where_the_reply_fits_its_command(self):
        for verb, said, expected in cases(self, re.findall(r"(\S+) (.*?) = (.*?)[;\n]", self.VERDICTS)):
            for way in WAYS[:2 if verb == "DATA" else 4]:
                primary = self.primary(way, **{verb: said.replace("|", "\n")})
                verdict, = self.deliver(primary, self.put())
                self.assertEqual(("%s %s" % verdict[1:3])[:len(expected)], expected)
                self.assertEqual(len(primary.messages), verdict.kind == "sent")

    # seconds that a reply may take, one of the wrong class, what becomes of the message then, and with a 5xx
    STAGES = [("MAIL", 300, "354 go", "d", "r"), ("RCPT", 300, "354 go", "d", "r"),
              ("DATA", 120, "250 ok", "d", "r"),
              (".", 600, "354 go", "d", "r"), ("RSET", 300, "354 go", "r", "r"),
              ("QUIT", 300, "354 go", "s", "s")]

    def test_every_fault_at_every_stage_has_its_outcome_and_no_message_is_lost_or_doubled(self):
        for (stage, _, wrong, usual, refused), way in cases(self, itertools.product(self.STAGES, WAYS[:2])):
            for fault, said in {**FAULTS, "wrong class": wrong}.items():
                self.row = (stage, fault, way)
                primary, ids = self.primary(way, **{stage: said}), [self.put(), self.put()]
                if stage == "RSET":             # RCPT was refused; RSET changes nothing
                    primary.script["RCPT"] = ["550 5.1.1 no", "250 ok"]
                if stage == "DATA" and isinstance(said, bytes):
                    primary.script["DATA"] = said.replace(b"250", b"354")
                self.deliver(primary, *ids)
                self.assertEqual(self.words(ids[0]), refused if fault == "5xx" else usual)
                reached, taken = primary.uses["."], len(primary.messages)
                left = [id for id in ids if self.words(id) in "ud"]
                primary.script.clear()
                self.deliver(primary, *left) if left else None
                self.assertEqual((self.words(*left), len(primary.messages) - taken),
                                 ("s" * len(left), len(left)))
                if stage != ".":                # there nobody knows whether it was taken
                    self.assertEqual(reached, taken)

    def test_every_reply_has_its_deadline(self):
        def drip(_):
            self.puppet.loop.later(20, lambda: drip("") and self.puppet.on_data(b"250-x\r\n"))
            return HANG
        for (stage, seconds, *_), way, said in cases(self,
                                                     itertools.product(self.STAGES[:4], WAYS, (HANG, drip))):
            if stage != "DATA" or "CHUNKING" not in way:
                self.deliver(self.primary(way, **{stage: said}), self.put())
                self.assertTrue(seconds <= self.seconds < seconds + 3, self.seconds)
                self.assertIn("timed out", self.error)
                self.assertEqual("no PIPELINING" in self.error, not self.one.may_pipeline)
                if stage == "RCPT":             # two answers are missing: what was sent ahead may be lost
                    self.assertEqual(self.one.may_pipeline, "PIPELINING" not in way)

    AGAIN, BYE, SPAM = b"250 taken\r\n250 again\r\n", b"250 taken\r\n421 enough\r\n", "550 5.7.1 spam"
    SEVERAL = [
        ("ssrds", {".": ["250", "250", SPAM, "451 later", "250"]}, ""),
        ("srrsds", {"MAIL": ["250", "250", SPAM, "250"], "RCPT": ["250", "550 5.1.1 no", "250"],
                    ".": ["250", "250", "452 full", "250"]}, ""),
        # a refusal of data for nobody is no reply out of step, and data is ended all the same
        *(("rs rs - -", {"RCPT": ["550 5.1.1 no", "250"], "none": said}, "") for said in (
            "503 5.5.1 RCPT first", "554 no", "354 go on")),
        # a 4xx to MAIL after messages were taken is a limit of the connection; said at once it is not
        *(("sssuuu", {"MAIL": ["250"] * 3 + [said]}, "") for said in ("452 4.5.3 Too many messages",
                "450 enough")),
        ("ddd", {"MAIL": "452 4.5.3 Too many messages"}, ""),
        # what comes behind a verdict does not undo it: no second copy
        ("- - su su", {"RSET": CUT}, "lost"), ("- - su su", {"RSET": "421 enough"}, "421"),
        ("su", {".": BYE}, "421"), ("ru", {".": "550 5.7.1 spam\n421 enough"}, "421"),
        ("suuu", {"MAIL": ["250", "421 enough"]}, "421"),
        # what was not begun goes back untried; with a window the data of others was sent, too
        ("sduu sduu sddd sduu", {".": ["250", CUT]}, "lost"), ("duuu", {".": CUT}, "lost"),
        # a reply too many: each verdict would be another command's
        ("ssuu", {".": ["250", AGAIN, "452 full"]}, None),
        ("sduu sduu - sduu", {"MAIL": ["250", AGAIN]}, None),
        ("- - s[du]uu s[du]uu", {"RCPT": ["250", AGAIN], ".": ["250", "452 full"]}, None),
        ("s[du]uu s[du]uu - -", {"DATA": ["354 go", b"354 go\r\n250 taken\r\n"]}, "not asked for")]

    def test_what_becomes_of_several_messages(self):
        """One word for all WAYS, or one for each, `-` where that does not occur there."""
        for words, script, error in cases(self, self.SEVERAL):
            for way, expected in zip(WAYS, words.split() if " " in words else [words] * 4):
                if expected != "-":
                    ids = [self.put(b"%d\r\n" % number) for number in range(len(expected.replace("[du]",
                            "d")))]
                    primary = self.primary(way, **script)
                    self.deliver(primary, *ids)
                    self.assertRegex(self.words(*ids), expected)
                    sent = [b"%d\r\n" % number for number, kind in enumerate(expected) if kind == "s"]
                    self.assertEqual([data for _, _, data in primary.messages][:len(sent)], sent)
                    if error is not None:
                        self.assertIn(error, self.error)
                        self.assertEqual((bool(self.error), primary.log[-1] == "QUIT"),
                                         (bool(error), not error))

    def test_a_reply_out_of_step_is_no_word_about_a_message(self):
        """The connection ends; mail goes again one by one, without window and PIPELINING."""
        for stage, code, way in cases(self, itertools.product(
                ["MAIL", "RCPT", "DATA", ".", "RSET"], (500, 502, 503, 504), WAYS)):
            if (stage == "DATA") if "CHUNKING" in way else (stage == "RSET"):
                continue
            primary = self.primary(way, **{stage: ["354 go" if stage == "DATA" else "250 ok",
                                                   "%d 5.5.1 what" % code]})
            ids, is_ahead = [self.put(b"%d\r\n" % number) for number in range(3)], way is not WAYS[1]
            self.deliver(primary, *ids)
            self.assertEqual(self.words(*ids), "suu" if is_ahead else "sdu")
            self.assertFalse(self.one.may_pipeline)
            self.assertEqual(primary.log[-1] == "QUIT", way is not WAYS[2])     # others are in flight there
            self.assertEqual("no PIPELINING" in self.connection.remark, is_ahead)
            self.assertIn("with %d" % code, self.connection.remark)
            if stage != "RSET":                 # still so: the peer is odd, and the message is put off
                self.deliver(primary, *ids[1:], one=self.one)
                self.assertEqual(self.words(ids[1]), "d")
            primary.script.clear()
            del primary.log[:]
            self.deliver(primary, *ids[1:], one=self.one)
            self.assertEqual((self.words(*ids[1:]), self.puppet.is_ahead), ("ss", False))
            self.assertFalse([line for line in primary.log if line[:4] == "BDAT"])

    def test_recipients(self):
        """A hundred at a time; those put off behind accepted ones go in the next transaction, at once."""
        many, some = (["u%d@%s" % (number, DOMAIN) for number in range(count)] for count in (250, 25))
        said = {"good": "250 2.1.5 ok", "bad": "550 5.1.1 no", "later": "450 4.2.1 full"}
        for way in cases(self, WAYS):
            primary = self.primary(way)
            verdicts = self.deliver(primary, self.put(recipients=many))
            self.assertEqual(([one.address for one in verdicts], {one.kind for one in verdicts}),
                             (many, {"sent"}))
            self.assertEqual([one[1] for one in primary.messages], [many[:100], many[100:200], many[200:]])
            primary.script["RCPT"] = lambda argument: said[argument[4:].partition("@")[0]]
            verdicts = self.deliver(primary, self.put(recipients=[
                "%s@%s" % (name, DOMAIN) for name in ("bad", "good", "later")]))
            self.assertEqual([(one.address[:3], one.kind, one.is_good) for one in verdicts],
                             [("bad", "refused", False), ("lat", "deferred", None), ("goo", "sent", True)])
            self.assertEqual(primary.messages[3:], [("a@sender.example", ["good@" + DOMAIN], MESSAGE)])
            for limit in ("452 4.5.3 too many", "451 4.3.0 later", "552 5.5.3 too many", "552 too many"):
                primary = self.primary(way)
                primary.script["RCPT"] = lambda _, primary=primary, limit=limit: (
                    limit if [one[:4] for one in reversed(primary.log)].index("MAIL") > 10 else None)
                self.assertEqual({one.kind for one in self.deliver(primary, self.put(recipients=some))},
                                 {"sent"})
                self.assertEqual([one[1] for one in primary.messages], [some[:10], some[10:20], some[20:]])

    def test_the_window_is_small(self):
        """What is in doubt when a connection breaks is bounded, however much waits."""
        for most, limits in cases(self, [(16, {"LATE_S": 10}), (3, {"CHUNK_MESSAGES": 3}),
                                         (3, {"CHUNK_REPLIES": 9})]):
            ids = [self.put() for _ in range(30)]
            with shorten(**limits):
                self.deliver(self.primary(WAYS[2], **{".": ["250 ok", CUT]}), *ids)
            self.assertEqual(self.words(*ids), "s" + "d" * most + "u" * (29 - most))

    def test_what_is_asked_of_the_primary_and_passed_on(self):
        utf8 = {"smtputf8": True, "sender": "\xe9@sender.example", "recipients": ["\xfc@" + DOMAIN]}
        people = {"recipients": [("user@" + DOMAIN, "FAILURE,DELAY", "rfc822;x@y")], "ret": "HDRS",
                  "envid": "QQ+2B"}
        head, said = "Subject: \xe9\r\n\r\n".encode(), {"smtputf8": True}
        for extension, values, data, limit, expected, words in cases(self, [
                ("DSN", {}, MESSAGE, 40, "5.3.4", None),
                ("SIZE", {}, MESSAGE, len(MESSAGE), "2.0.0", "SIZE=50"),
                ("DSN", utf8, MESSAGE, 0, "5.6.7", None), ("SMTPUTF8", utf8, MESSAGE, 0, "2.0.0", "SMTPUTF8"),
                # SMTPUTF8 counts where envelope or header has an octet beyond ASCII; else it goes without
                ("DSN", said, MESSAGE + b"\xe9\r\n", 0, "2.0.0", ""), ("DSN", {}, head, 0, "2.0.0", ""),
                ("DSN", said, head, 0, "5.6.7", None),
                ("DSN", dict(said, recipients=utf8["recipients"]), MESSAGE, 0, "5.6.7", None),
                ("DSN", people, head, 0, "2.0.0",
                 "RET=HDRS ENVID=QQ+2B NOTIFY=FAILURE,DELAY ORCPT=rfc822;x@y"),
                ("8BITMIME", dict(people, body="8BITMIME"), b"\xe9\r\n", 0, "2.0.0", "BODY=8BITMIME"),
                ("PIPELINING", dict(people, body="8BITMIME"), b"\xe9\r\n", 0, "2.0.0", "")]):
            one = etrn.Destination(DOMAIN, config().domain(DOMAIN), self.clock.now)
            one.size_limit = limit
            primary, ids = self.primary([extension]), [self.put(data, **values), self.put(b"next\r\n")]
            verdict, = self.deliver(primary, *ids, one=one)
            self.assertEqual((verdict.status, self.words(ids[1])), (expected, "s"))
            if words is not None:
                found = " ".join(line.partition(">")[2].strip() for line in primary.log[:2]).strip()
                self.assertEqual((found, verdict.is_told), (words, extension == "DSN"))
            self.assertEqual([one[2] for one in primary.messages], [data, b"next\r\n"][words is None:])

    def introduced(self, verb, clients, **script):
        """What a primary that offers XCLIENT or XFORWARD hears when it is sent a message of each client."""
        primary = self.primary(["PIPELINING", verb + " NAME ADDR PROTO HELO PORT", "SIZE"], **script)
        ids = [self.put(client={"address": address, "name": name, "helo": helo, "tls": None})
               for address, name, helo in clients]
        self.deliver(primary, *ids, xclient="yes")
        self.assertEqual((self.words(*ids), self.error), ("s" * len(ids), ""))
        return primary.log

    def test_the_original_client_is_handed_on_as_postfix_documents_it(self):
        us = "backup.example.net"
        for client, name, address, helo, ehlo in cases(self, [
                (("192.0.2.7", "b.example", "mx.b.example"), "b.example", "192.0.2.7", "mx.b.example",
                 "mx.b.example"),
                (("192.0.2.8", "unknown", "x"), "[UNAVAILABLE]", "192.0.2.8", "x", "x"),
                (("2001:db8::1", "", "a b+c=\u00e9<x>"), "[UNAVAILABLE]", "IPV6:2001:db8::1",
                 "a+20b+2Bc+3D+C3+A9<x>", "[IPV6:2001:db8::1]"), (("", "", ""), us, "127.0.0.1", us, us),
                (("192.0.2.9", "", ""), "[UNAVAILABLE]", "192.0.2.9", "[UNAVAILABLE]", "[192.0.2.9]")]):
            for verb, code in (("XCLIENT", "220 again"), ("XFORWARD", "250 ok")):
                log = self.introduced(verb, [client], **{verb: code})
                self.assertEqual(log[0], "%s NAME=%s ADDR=%s PROTO=ESMTP HELO=%s PORT=[UNAVAILABLE]" % (
                    verb, name, address, helo))
                self.assertEqual(log[1] == "EHLO " + ehlo, verb == "XCLIENT")
        one, two, own = ("192.0.2.7", "", "x"), ("192.0.2.8", "", "x"), ("", "", "")
        for verb, clients, expected in cases(self,
                                             [      # XCLIENT holds until another, XFORWARD for one message
                ("XCLIENT", [one, one, two, two, one], "192.0.2.7 192.0.2.8 192.0.2.7"),
                ("XCLIENT", [one, own, own], "192.0.2.7 127.0.0.1"),
                ("XFORWARD", [one, one], "192.0.2.7 192.0.2.7")]):
            log = self.introduced(verb, clients, **{verb: "220 again"})
            self.assertEqual(" ".join(line.split()[2][5:] for line in log if line.startswith(verb)), expected)
            self.introduced(verb, clients, **{verb: "550 5.7.0 not you"})       # gets the mail all the same
            self.assertIn("refuses %s: 550 5.7.0 not you" % verb, self.connection.remark)
        ids = [self.put(), self.put(b"MAIL FROM:<forged@bank.example>\r\n")]
        self.deliver(self.primary(["XCLIENT ADDR"], XCLIENT=CUT), *ids, xclient="yes")
        self.assertEqual(self.words(*ids), "du")
        primary = self.primary(WAYS[2] + ["XCLIENT ADDR"], XCLIENT="220 again",
                               EHLO="250-primary.example\n250 SIZE")
        self.deliver(primary, ids[1], xclient="yes")    # what is offered then counts
        self.assertEqual((self.puppet.is_ahead, primary.messages[0][0]), (False, "a@sender.example"))

    def test_what_a_question_is_answered_with(self):
        def ask(primary, address="u@" + DOMAIN):
            heard = []
            self.deliver(primary, self.put(), say=lambda connection: etrn.verify(
                connection, address, lambda *word: heard.append(word)))
            self.assertEqual(len(heard), 1)
            return heard[0]
        for word, replies in cases(self, {
                "good": ["250 ok", "251 forwards"],
                "bad": ["550 5.1.1 x", "550 5.1.2 x", "550 5.1.3 x", "550 5.1.6 x", "550 5.1.10 x", "550 x",
                        "550 2.1.1 x", "554 5.1.1 x", "552 5.1.1 x", "551 x", "553 x", "501 5.1.3 x"],
                "silent": ["550 5.7.1 x", "550 5.7.23 x", "550 5.1.0 x", "550 5.1.7 x", "550 5.1.8 x",
                           "550 5.2.1 x",
                           "552 5.2.2 x", "554 x", "552 x", "503 x", "450 x", "450 5.1.1 x", "354 x"],
                "lost": [CUT, HANG, "421 x", b"garbage\r\n", b"550-5.1.1 a\r\n250 b\r\n"]}.items()):
            for said, way in itertools.product(replies, WAYS[:3]):
                primary = self.primary(way, RCPT=said)
                self.assertEqual(ask(primary), (word, said if word != "lost" else ""))
                self.assertEqual(primary.log[0], "MAIL FROM:<>")
                if word != "good":              # said of the null sender it is no word about the recipient
                    self.assertEqual(ask(self.primary(way, MAIL=said))[0], word.replace("bad", "silent"))
        for way in cases(self, WAYS[:3]):           # it hangs up behind its refusal, as Exim's `drop` does
            self.assertEqual(ask(self.primary(way, RCPT="550 5.1.1 x", RSET=CUT)), ("bad", "550 5.1.1 x"))
        for extensions, word, commands in cases(self, [([], "silent", 1), (["SMTPUTF8"], "good", 4)]):
            primary = self.primary(extensions)
            self.assertEqual((ask(primary, "\xe9@" + DOMAIN)[0], len(primary.log)), (word, commands))


class PuppetSpool(etrn.SpoolProcess):
    """Without its process."""

    def _send(self, is_read):
        asked, self.asked[is_read] = self.asked[is_read], []
        for one in asked:
            self._tell(etrn.do_batch(self.spool, [one]))


class Simulation:
    """A Queue whose clock is not real and whose primaries are played: days pass in moments."""

    def __init__(self, folder, options=""):
        Simulation.current = self
        self.clock = Clock()
        self.spool = etrn.Spool(os.path.join(folder, "spool"))
        self.spool.open()
        self.puppets = []                 # open connections
        self.log = []                        # commands as they came
        self.dials = []        # (when, destination)
        self.offered = []      # (when, ID) at MAIL
        self.messages = []
        self.alerts = []
        self.extensions, self.pace_s, self.serial = ["PIPELINING"], 0.1, 0
        self.reach = lambda name: None        # None: it greets; a text: why not; HANG
        self.script = {}           # verb: of the ID or address; None: yes
        self.clients, self.replies = [], []         # of messages whose client waits for the primary's word
        self.faults = contextlib.ExitStack()        # of the disk
        usual = [one + "\n" for one in ("primary = 192.0.2.1", "recipients = any")
                 if one.split()[0] not in options.partition("[")[0]]
        self.cfg = config("nameservers = 127.0.0.1:9", "".join(usual) + options)
        self.begin()

    def begin(self):
        """The relay starts."""
        self.loop = PuppetLoop(self.clock)
        self.puppets.clear()
        self.journal = etrn.Log("stderr", "debug", "backup.example.net")
        self.queue = etrn.Queue(self.cfg, PuppetSpool(self.spool, self.loop), self.loop, self.journal)
        self.queue.load_state(self.spool.load_state("state.json"), self.spool.load_state("recipients.json"))
        self.queue.loader.load()
        self.turn()

    def restart(self, asleep="0"):
        self.queue.save_state()
        self.turn()
        self.clock.advance(days=float(asleep))
        self.begin()

    def dial(self, plan):
        word = self.reach(plan.name)
        self.dials.append((self.clock.mono, plan.name))
        if word is None:
            return etrn.Dialled(greeted(self, self.extensions), "", (HOP,))
        return etrn.Dialled(None, "connect to %s: %s" % (HOP, "timed out" if word is HANG else word), (HOP,))

    def _said(self, verb, argument, default):
        path = argument.partition("<")[2].partition(">")[0]
        id = (path if verb == "MAIL" else self.current.sender).partition("@")[0]
        self.offered += [(self.clock.mono, id)] * (verb == "MAIL" and id != "")
        return self.script.get(verb, lambda _: None)(path if verb == "RCPT" else id) or default

    @property
    def taken(self):
        return [sender.partition("@")[0] for sender, _, _ in self.messages]

    @property
    def one(self):
        return self.queue.destinations.get(DOMAIN, self.clock.now)

    def put(self, *addresses, domain=DOMAIN, kind="mail", sender=None, data=MESSAGE, across=0.0, **values):
        """Accept a message; its sender tells its ID.  Recipients may have NOTIFY and ORCPT with them.
        `across`: days by which the clock is set while the disk is at work."""
        self.serial += 1
        id = "%X" % (0xABC000 + self.serial)
        people = [(one, "", "") if isinstance(one, str) else one
                  for one in addresses or ["u%d@%s" % (self.serial, domain)]]
        sender = "%s@sender.example" % id if sender is None else sender
        sidecar = dict(etrn.make_sidecar(id, kind, domain, sender, people, self.clock.wall,
                                         self.clock.wall + 9,
                                         {"address": "192.0.2.7", "helo": "x", "tls": None}), **values)
        assert self.spool.commit([(id, data, [sidecar])]) == [None]
        self.jump(across)
        self.queue.accept(sidecar, len(data), *self.clients)
        return id

    def turn(self):
        self.loop.turn()
        self.queue.sweep()
        self.queue.alerts.sweep(1 << 40, 0.0)
        self.loop.turn()

    def run(self, seconds=0, until=lambda: False):
        """Let time pass."""
        end = self.clock.mono + seconds
        while self.clock.mono < end and not until():
            self.turn()
            at = self.clock.mono + (1 if seconds < 600 or self.puppets else 300 if seconds > 7000 else 30)
            at = min([at, end, *(one[0] for one in self.loop.timers[:1])])
            self.clock.advance(max(0.001, at - self.clock.mono))
        self.turn()

    def down(self, count="0", how="Connection refused"):
        """It goes away, and so many messages come."""
        self.reach = lambda name: how
        for connection in self.queue.deliveries.all():
            connection.cut()
        for _ in range(int(count)):
            self.put()

    def back(self, *rcpt):
        """It greets again, and says this to each recipient."""
        self.reach, self.script["RCPT"] = lambda name: None, lambda address: " ".join(rcpt)

    def jump(self, days):
        self.clock.wall += 86400.0 * float(days)

    def flush(self):
        """By command.  How it ends."""
        self.answers = etrn.run_command(self.queue, {"command": "flush", "what": DOMAIN})
        return next(self.answers)

    def etrn(self, count="1"):
        """So many, a twentieth of a second apart; the last one's reply."""
        for number in range(int(count)):
            self.run(0.05 if number else 0)
            code = etrn.answer_etrn(self.queue, DOMAIN, "192.0.2.1", "x").code
        return code

    def state(self):
        """The primary's, and how many messages wait, were bounced, expired."""
        one = self.one
        counts = ["%d %s" % (one.counters[what], what)
                  for what in ("bounced", "expired") if one.counters[what]]
        return ", ".join(["%s %d" % (one.state.value, len(one.entries)), *counts])

    def pauses(self):
        """Between dials since it was asked last: the shortest and the longest."""
        times, self.dials = [at for at, _ in self.dials], []
        gaps = [round(after - before) for before, after in zip(times, times[1:])]
        return "%d to %d" % (min(gaps), max(gaps))

    def turns(self):
        """Since it was asked last: how many transactions, of how many messages."""
        offered, self.offered = self.offered, []
        return "%d of %d" % (len(offered), len({id for _, id in offered}))

    def times(self, number):
        """When the nth message was offered, since the first time."""
        at = [at for at, id in self.offered if id == "%X" % (0xABC000 + int(number))]
        return " ".join("%d" % round(one - at[0]) for one in at)

    def order(self):
        """In which messages were offered."""
        return " ".join("%d" % (int(id, 16) - 0xABC000) for _, id in self.offered)

    def logged(self, *pattern):
        return sum(re.search(" ".join(pattern), line) is not None for line in self.journal.lines)

    def notices(self):
        """Targets and parts of the notices that wait in the spool."""
        out = []
        for one in self.queue.destinations.all.values():
            for sidecar, data in self.spool.read(list(one.entries) if one.cfg.is_notices else []):
                assert (sidecar["sender"], sidecar["kind"]) == ("", "notice")
                parsed = email.message_from_bytes(data, policy=email.policy.default)
                out.append((sidecar["recipients"][0]["address"], list(parsed.iter_parts())))
        return out

    def fail(self, *faults):
        """Of these methods of the spool each fails with the error behind it."""
        for what, code in zip(faults[::2], faults[1::2]):
            error = OSError(getattr(errno, code), code)
            self.faults.enter_context(mock.patch.object(self.spool, what, side_effect=error))

    def ask(self, name):
        """What a client is told of a recipient; it `took` so many seconds."""
        heard, began = [], self.clock.mono

        def hear(word, _):
            heard.append(word)
            self.took = round(self.clock.mono - began)
        self.queue.deliveries.ask(self.one, "%s@%s" % (name, DOMAIN), hear)
        self.run(6, until=lambda: heard)
        return ", ".join(heard)

    def say(self, verb, *words):
        """It says this from now on; `to` these messages or users, to all `but` these, or `once`."""
        how, some, text = re.fullmatch("(?:(to|but|once)(.*?): )?(.*)", " ".join(words)).groups("")
        keys = ["%X" % (0xABC000 + int(one)) if one.isdigit() else one for one in some.split()]
        said = {"HANG": HANG, "CUT": CUT}.get(text, text.replace("|", "\n"))
        first = iter([said])

        def answer(key):
            if how == "once":
                return next(first, None)
            return said if (key.partition("@")[0] in keys) is (how == "to") else None
        self.script[verb] = answer

    def orders(self):
        """Words of stories, besides the methods above: what is done."""
        def person(text):
            """`u`, or `u/NEVER`."""
            name, _, notify = text.partition("/")
            return "%s@%s" % (name, DOMAIN), notify, ""

        def half(ids):
            """A removal whose last fsync fails."""
            type(self.spool).remove(self.spool, ids)
            raise OSError(errno.EIO, "of the last fsync")

        def limit(most):
            """More recipients of one transaction are put off."""
            self.script["RCPT"] = lambda _: "452 4.5.3 too many" if [
                line[:4] for line in reversed(self.log)].index("MAIL") > int(most) else None
        return {
            "put": lambda *who: self.put(*map(person, who)),
            "null": lambda: self.put(sender=""),
            "large": lambda octets: self.put(data=b"x" * int(octets) + b"\r\n"),
            "utf8": lambda: self.put(sender="\xe9@sender.example", smtputf8=True),
            "across": lambda days: self.put(across=float(days)),
            "many": lambda count: [self.put() for _ in range(int(count))],
            "wait": lambda: self.clients.append(self.replies.append),
            "hang": lambda count: self.down(count, HANG),
            "alone": lambda: setattr(self, "reach", lambda name: None if name == DOMAIN else "refused"),
            "narrow": lambda: setattr(self, "reach", lambda name: "421 too many" if self.puppets else None),
            "offer": lambda *words: setattr(self, "extensions", [" ".join(words)]),
            "pace": lambda seconds: setattr(self, "pace_s", float(seconds)),
            "limit": limit,
            "only": lambda what: setattr(self.queue, "only", what),
            "usr1": lambda: self.queue.probe_all(),
            "hold": lambda: self.queue.hold(DOMAIN, True, lambda _: None),
            "release": lambda: self.queue.hold(DOMAIN, False, lambda _: None),
            "reload": lambda: self.queue.loader.load(),
            "lose": lambda name: os.unlink(os.path.join(self.spool.path, name)),
            "half": lambda: self.faults.enter_context(mock.patch.object(self.spool, "remove", half)),
            "mend": self.faults.close}

    def questions(self):
        """... and what is asked."""
        def kinds():
            """Of the messages in the spool, all of which the queue knows."""
            ids = {id for one in self.queue.destinations.all.values() for id in one.entries}
            found = {id: self.spool.read_sidecar(id)["kind"] for id in self.spool.list()[0]}
            return " ".join(sorted(found.values())) if ids == set(found) else "%s, known %s" % (found, ids)
        return {
            "taken": lambda: len(self.taken),
            "people": lambda: ", ".join(" ".join(one.partition("@")[0] for one in people)
                                        for _, people, _ in self.messages),
            "replied": lambda: " ".join(str(reply.code if reply else 250) for reply in self.replies),
            "dialling": lambda: self.queue.deliveries.dialling,
            "dialled": lambda: len(self.dials),
            "open": lambda: len(self.puppets),
            "heard": lambda *words: sum(re.match(" ".join(words), line) is not None for line in self.log),
            "took": lambda: self.took,
            "known": lambda: len(self.queue.recipients.known),
            "knows": lambda name: self.queue.recipients.knows("%s@%s" % (name, DOMAIN), self.clock.wall),
            "delivered": lambda: self.one.counters["delivered"],
            "files": lambda: len(self.spool.list()[0]),
            "kinds": kinds,
            "states": lambda id: " ".join(one["state"] for one in self.spool.read_sidecar(id)["recipients"]),
            "told": lambda: " ".join("%s %s" % (target, parts[1].get_payload()[1]["Status"])
                                     for target, parts in self.notices()),
            "alerts": lambda: " ".join("%s:%d" % (one["event"], one["waiting"]) for one in self.alerts),
            "ended": lambda: [one for one in itertools.islice(self.answers, 99) if one][-1].get("deferred")}

    def tell(self, test, story):
        """Statements, and questions with ` = ` and what their answer matches."""
        words = {**self.orders(), **self.questions()}
        for said in story.split("; "):
            question, is_asked, answer = said.partition(" =")
            word, *rest = question.split()
            test.row = (said, story)
            if word[0] == "+":
                self.run(float(word[1:-1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[word[-1]])
            else:
                found = words.get(word, getattr(self, word, None))(*rest)
                test.assertRegex(str(found) if is_asked else "", r"\A%s\Z" % answer.strip())


class Simulated(Played):
    """Tests on a clock that is not real."""

    def setUp(self):
        super().setUp()
        enter(self, mock.patch.multiple(
            etrn, dial=lambda plan: Simulation.current.dial(plan),
            run_alert_command=lambda _, one: Simulation.current.alerts.append(one) or ""))
        enter(self, mock.patch("time.time", lambda: Simulation.current.clock.wall))
        enter(self, mock.patch("os.fsync"))

    def simulate(self, *options):
        memory = "/dev/shm"             # many times as fast as a disk
        folder = enter(self, tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None))
        sim = self.sim = Simulation(folder, "\n".join(options))
        self.addCleanup(sim.spool.close)
        return sim

    def tell(self, stories):
        """Each in a simulation of its own, with the options before its colon; indented lines go on."""
        stories = re.sub("\n  ", "; ", re.sub("#.*\n", "", stories)).strip().split("\n")
        for story in cases(self, stories):
            options, text = re.fullmatch("(?:([^;:]+=[^;:]+): )?(.*)", story).groups("")
            self.simulate(*options.split(" | ")).tell(self, text)


class Recording(Simulated):
    """The queue and a disk that does not take what it says."""

    def look(self):
        """As at SIGHUP: messages in the queue, and the number of those in corrupt/."""
        self.sim.queue.loader.load()
        self.sim.turn()
        ids = sorted(id for one in self.sim.queue.destinations.all.values() for id in one.entries)
        return ids, self.sim.spool.count_corrupt()

    STORIES = r"""
# a full disk keeps nothing from being tried, at growing pauses, and what was delivered is not forgotten
put u; fail _replace ENOSPC remove EROFS; say RCPT 450 4.2.0 later; +3h; turns = [4-8] of 1; say RCPT; +2h
  taken = 1; state = up 1; logged : removed = 0; logged ABC001: cannot be removed, trying again = [1-9]\d*
  mend; +60s; taken = 1; state = up 0; files = 0
# where it takes no removal, only so many messages go as may go twice after a crash, and each once
fail remove EIO; put u; +10s; down 1; +10s; back; +60s; order = 1 2; taken = 2; many 9; +600s; taken = [2-6]
  mend; +60s; taken = 11; state = up 0; files = 0; delivered = 11
# a refusal that cannot be written down is 451: 550 is wrong, the message may still be here, and so is 250
recovery_grace = 0s | cutthrough = yes: put u; +10s; say . 554 5.7.1 spam; fail remove EIO; wait; put u; +10s
  replied = 451
# a sender hears once, however often it takes to write that down; and the loop knows of the notice, also when
# its message has left, or lost its body, meanwhile
lifetime = 1h: down; put u; fail remove ENOSPC; +2h; mend; +60s; kinds = notice
lifetime = 1h: down; put u; half; +2h; mend; +60s; kinds = notice
lifetime = 1h: down; put u; lose ABC001.eml; +2h; kinds = notice
delay_notice = 1h: down; put u; fail _replace ENOSPC; +2h; alone; +60s; mend; +60s; kinds = notice
delay_notice = 1h: down; put u; fail _replace ENOSPC; +2h; reload; +1s; mend; +60s; kinds = mail notice
# mail that is released is told of, too; and what could not be read when its time came is looked at again
delay_notice = 4h: down; put u; +1h; hold; +4h; release; +5m; kinds = mail notice
delay_notice = 1h: down; put u; fail look EIO; +2h; mend; +60s; kinds = mail notice
lifetime = 1d: down; put u; fail look EIO; +30h; kinds = mail; mend; +60s; kinds = notice
# a run for one domain leaves the others alone: --flush DOMAIN without a relay would cut them in the middle
only other.example; put u; +60s; turns = 0 of 0; only all; flush; +60s; taken = 1
# a delivery to some is written down before the rest is tried; what is counted is messages, not transactions
say RCPT to other: 450 4.2.0 later; put user other; fail _replace ENOSPC; +3h; turns = 1 of 1; people = user
  mend; +60s; states ABC001 = delivered queued; say RCPT; +2h; people = user, other; delivered = 1
"""

    def test_stories(self):
        with shorten(UNRECORDED_MAX=4):
            self.tell(self.STORIES)

    def test_a_pair_that_is_being_copied_is_waited_for_and_half_of_one_not_for_ever(self):
        sim, ids = self.simulate(), ["ABCD0%d" % number for number in range(5)]
        sim.reach = lambda name: "Connection refused"
        sim.clock.wall = os.stat(self.folder).st_ctime
        self.look()
        for id, steps in zip(ids, cases(self, [
                ["eml 50", "eml 100", "json 50", "json 100"], ["json 0", "json 100", "eml 0", "eml 100"],
                ["json 100", "eml 90", "eml 100"], ["eml 100", "json 100"], ["json 100"]])):
            files = pair(sidecar_of(id), MESSAGE * 100)
            for kind, share in map(str.split, steps):
                self.assertEqual(self.look(), (ids[:ids.index(id)], 0))
                name = "%s.%s" % (id, kind)
                write_files(sim.spool.path, {name: files[name][:len(files[name]) * int(share) // 100]})
                os.utime(os.path.join(sim.spool.path, name), (5.0, 5.0))        # cp -p, rsync -t
                sim.clock.wall = os.stat(os.path.join(sim.spool.path, name)).st_ctime + 1
            self.assertEqual(self.look(), (ids[:4][:ids.index(id) + 1], 0))
        sim.run(60)
        self.assertEqual(self.look(), (ids[:4], 1))

    def test_a_spool_of_version_0_1_is_taken_over_whatever_stands_in_its_state_files(self):
        sim, counters = self.simulate(), dict.fromkeys(etrn.COUNTERS, 3)
        wall = sim.clock.wall
        write_files(sim.spool.path, pair(old_sidecar("ABCDE1", [USER, "u@other.example"], ["other.example"])))
        state = {"format": 1, "saved": wall, "homes": {DOMAIN: "192.0.2.1"}, "sites": {DOMAIN: {
            "primary": "down", "since": wall - 100, "recovered": wall - 5000, "pardoned": 0.0, "held": True,
            "size_limit": 5, "route": [["m.example", "192.0.2.1", 25]], "route_seen": wall, "last_error": "x",
            "route_of": "192.0.2.1:25", "told": True, "counters": counters}}}
        people = {"format": 1, "recipients": {USER: [True, wall + 5]}, "accept_all": {DOMAIN: [True, wall]}}
        for name, value in (("state.json", state), ("recipients.json", people)):
            write_files(sim.spool.path, {name: json.dumps(value).encode("ascii")})
        sim.fail("_create", "ENOSPC")
        sim.begin()
        sim.tell(self, "state = down 0, .*")
        sim.faults.close()
        sim.run(60)                                 # asked again
        self.assertEqual([(one.name, [(entry.id, entry.is_held) for entry in one.entries.values()])
                          for one in sim.queue.destinations.all.values()],
                         [(DOMAIN, [("ABCDE1", False)]), ("other.example", [("ABCDE101", True)])])
        one, mono = sim.one, sim.clock.mono - 60
        self.assertEqual((one.state, one.is_held, one.counters, list(map(str, one.route)), one.last_error),
                         (etrn.Primary.DOWN, True, counters, ["m.example[192.0.2.1]:25"], "x"))
        ages = [round(mono - at) for at in (one.since, one.recovered)]
        self.assertEqual((ages, one.size_limit), ([100, 5000], 5))
        self.assertTrue(sim.queue.recipients.is_good(USER, wall))
        for changed, others in cases(self, [*((one, people) for one in SpoolPeople.variants(state)),
                                            *((state, one) for one in SpoolPeople.variants(people))]):
            queue = etrn.Queue(sim.cfg, sim.queue.spool, sim.loop, sim.journal)
            queue.load_state(changed, others)       # costs only what was learned
            queue.save_state()
            queue.sweep()
            sim.loop.turn()
            for one in queue.destinations.all.values():
                etrn.format_duration(sim.clock.mono - one.since)
                one.is_recovering(sim.clock.now)
        self.assertEqual(sim.logged("cannot be recorded|bug"), 0)


class Recovery(Simulated):
    """Days of a primary's life."""

    STORIES = r"""
# in an outage it is tried soon, then every probe_interval, at once on ETRN; a flood of them costs one a secon
probe_interval = 5s: down 1; +20m; pauses = 1 to 5; etrn; +1s; back; etrn = 253; etrn = 250; +2s; state = up 0
probe_interval = 1s: down 1; +20m; pauses = 1 to 1
probe_interval = 60s: down 1; +3h; pauses = 1 to 60; etrn 200; pauses = 1 to 1
# two at most hang, also when ETRN asks for a fresh one; a dial of the outage is no word about who came back
hang 1; +10m; dialling = 2; etrn 40; +1m; dialling = 2; back; etrn; +1s; state = up 0; +1m; state = up 0
  dialling = 0
# a primary that refuses everybody for ten minutes loses nobody's mail: one each probe_interval, in turns
recipients = verify: down 40; +1m; back 550 5.1.1 no such user; +30s; state = rejecting 40; turns; put u
  +570s; state = rejecting 41; turns = 11[0-4] of 41; known = 0; back; +30s; state = up 0; taken = 41
  logged : rejecting: 550 5.1.1 no such user = 1
  logged : up after rejecting for .*m.*, .* messages waiting = 1
down 40; +15m; back 554 5.7.1 Relay access denied; +30s; state = rejecting 40; +60s; back; +30s; state = up 0
# a flood of ETRNs makes it try others, one a second, and ends no rejecting; a flush does, and ends with it
down 30; +1m; back 550 no; +30s; turns; etrn 400; turns = 20 of 20; state = rejecting 30; flush; state = up 30
  +30s; state = rejecting 30; ended = 30; say RCPT to u1: 550 no; +20s; state = up 1; taken = 29
# within the grace a refusal is kept; a second one after it is final; a steady primary is believed at once
recipients = verify: down 1; +1m; back 550 5.1.1 no; +3500s; state = up 1; known = 0; +4500s
  state = up 0, 1 bounced; put v; +5s; state = up 0, 2 bounced; restart; state = unknown 0, 2 bounced; put w
  +5s; state = up 1, 2 bounced; +2h; state = up 0, 3 bounced
# who was known to be good is refused twice; content is no word about him; one message changes no state
retry_interval = 1m | max_retry_interval = 1m: put u; +2h; say . 554 5.7.1 spam; put u; +5s
  state = up 0, 1 bounced; say .; back 550 no; put u; +50m; state = up 1, 1 bounced; +50m
  state = up 0, 2 bounced
# three known ones refused in a row make a steady one rejecting; what was said before its end does not count
probe_interval = 1m: put a; put b; put c; +5h; say RCPT to a b c: 550 no; put a; +2s; put b; +2s; state = up 2
  put c; +2s; state = rejecting 3; +2h; state = rejecting 3; put o; +4m; logged : up after rejecting = 1; +2h
  state = rejecting 3; put o; +4m; +2h; state = rejecting 3; say RCPT to a b: 550 no; put o; +4m; +2h
  state = up 0, 2 bounced
# a message that is put off is offered again after 5, 10, 20 ... minutes, sooner after an outage
put u; +1s; say . 450 4.2.0 later; put u; +3h; times 2 = 0 300 900 2100 4500 810.
down 1; +1m; back 450 4.2.0 later; +40m; times 1 = 0 60 360 1560
# the oldest goes alone, then the next oldest; what was being sent when an ETRN came goes again, once
down 5; +60s; back; +5s; order = 1 2 3 4 5
put u; say . 450 later; +0.05s; etrn; +290s; times 1 = 0 1
# canaries put off have their turns; after three, greylisting, all are offered once
down 10; +1m; back 450 4.2.0 grey; +9s; turns = 10 of 10
# a message that makes it hang up has pauses of its own; who greets and hangs up is not dialled all the time
say . to 1: CUT; many 9; +2m; times 1 = 0 1 [45] 2. 8.; taken = 8
connections = 1: say . CUT; many 3; +20s; pauses = 1 to [1-5]
# the others, dialled ahead, are no more than mail waits for; they wait for the canary, and go when it fails
say . HANG; many 4; +9s; open = 4; turns = 1 of 1; +10s; turns = 1 of 1; +1m; open = 4; turns = 2 of 2
say . 550 5.7.1 no; down 12; +1m; back; +9s; state = rejecting 12; open = [01]
say . CUT; many 40; +10m; turns = 2.. of 40; dialled = 2..
say . to 3: HANG; many 3; +5s; taken = 2; open = 1
# who answers out of step is not dialled for each message at once
say DATA 503 5.5.1 what; many 200; +10s; dialled = 1.
# held mail stays, and later mail with it; it has its chance when it is released
probe_interval = 1h: down 1; +5s; hold; put u; +8d; state = down 2; etrn = 458; release; +1h; state = down 2
  +3h; state = down 0, 2 expired
# one that takes a single connection gets all, and is not dialled for others all the time
down 900; +60s; narrow; +110s; state = up 0; dialled = 1[0-9][0-9]
# hang-ups after refusals are no outage; the pause grows, and it is told once
connections = 1: say RCPT 550 5.7.1 no|421 bye; many 4; +20s; state = up 4; pauses = 1 to 4
  logged it hangs up = 1; logged primary\[ = 2
connections = 1: say RCPT 550 5.7.1 no; say none CUT; say RSET CUT; many 4; +20s; state = up 4
  pauses = 1 to 4
# mail expires after its lifetime and three attempts
probe_interval = 1h: down 1; +6.9d; state = down 1; +4h; state = down 0, 1 expired; put u; +1s; restart 8
  state = down 1, 1 expired; +3h; state = down 0, 2 expired
  logged to=<u@.*status=expired .connect to .*refused = 1
# a clock that is set gives mail of this run its true age, over a restart too; older mail may really be old
probe_interval = 1h: down 1; jump 10; +60s; state = down 1; begin; +167h; state = down 1; +7h
  state = down 0, 1 expired
probe_interval = 1h: down 1; jump -10; +60s; state = down 1; begin; +167h; state = down 1; +7h
  state = down 0, 1 expired
probe_interval = 1h: down 1; +60s; begin; jump 10; +1s; state = down 1; +60s; state = down 0, 1 expired
probe_interval = 1h: down 1; jump 10; put u; +60s; begin; +167h; state = down 2; +7h
  state = down 0, 2 expired
probe_interval = 1h: down 1; across -9; +60s; begin; +167h; state = down 2; +7h; state = down 0, 2 expired
probe_interval = 1h: down 1; across 9; +60s; begin; +167h; state = down 2; +7h; state = down 0, 2 expired
# ... and of what was refused when nothing is believed
down 1; +1m; back 550 5.1.1 no; +30s; jump 30; etrn; +60s; state = up 1; +9000s; state = up 0, 1 bounced
down 1; +1m; back 550 5.1.1 no; +30s; jump -30; etrn; +60s; state = up 1; +9000s; state = up 0, 1 bounced
# where nothing can be tried, time that really passed stands for attempts
primary = atrn: put u; jump 30; +6.9d; state = unknown 1; +5h; state = unknown 0, 1 expired
# who comes by itself is not dialled, by nobody's wish
primary = etrn: put u; +1h; etrn = 250; flush; +1m; put u; state = unknown 2; dialled = 0
# alerts come once for each turn of events, not for short outages; a restart neither repeats nor forgets one
[alerts] | command = /bin/true: hold; put u; +6.9d; alerts =; release; down; put u; +1s; alerts = expiring:2
[alerts] | command = /bin/true: down 3; +290s; alerts =; +20s; alerts = down:3; restart; +1h; back 550 no
  +60s; back; +60s; alerts = down:3 up:3 rejecting:3 up:3; down 1; +60s; back; +400s
  alerts = down:3 up:3 rej.*g:3 up:3; down 1; +100s; restart; +150s; alerts = down:3 up:3 rejecting:3 up:3
  +100s; alerts = down:3 up:3 rejecting:3 up:3 down:1
probe_interval = 1h | [alerts] | command = /bin/true | after = 7d: down 1; +5.9d; alerts =; +4h
  alerts = expiring:1
lifetime = 12h | [alerts] | command = /bin/true: put u; +1s; down 1; +60s; alerts =
# word about recipients is believed, and remembered, of a primary that is itself: steady, or proven since
recipients = verify: say RCPT but u: 550 5.1.1 no; ask u = good; knows u = True; ask v = bad; knows v = False
recipients = verify: down 1; +1m; back; +5s; state = up 0; say RCPT 550 5.1.1 no; ask v = bad; knows v = False
recipients = verify: state = unknown 0; down; usr1; +1m; state = down 0; back; usr1; +1s; state = up 0
  say RCPT but u: 550 5.1.1 no; ask v = bad; knows v = None; ask u = good; knows u = True
recipients = verify: down 1; +1m; back 550 5.1.1 no; +1s; state = up 1; ask v = silent; knows v = None
  say RCPT but v: 550 5.1.1 no; ask v = good; knows v = True
recipients = verify: down 3; +1m; back 550 5.1.1 no; +5s; state = rejecting 3; ask v = silent; knows v = None
  say RCPT but v: 550 5.1.1 no; ask v = silent; knows v = None
recipients = verify: say RCPT 550 5.7.1 no; ask u = silent; knows u = None
# knowledge has its time, over restarts too: of a good one 31 days, of a bad one 3; that all are taken, a day
recipients = verify: say RCPT but Good: 550 5.1.1 no; ask Good = good; ask bad = bad; restart 2.9
  knows bad = False; restart 0.2; knows bad = None; restart 27.8; knows GOOD = True; restart 0.2
  knows good = None
recipients = verify: ask any = good; restart 0.9; knows other = True; restart 0.2; knows other = None
# five refused in a row with no good one known are doubted; whether anybody is taken is asked once a day
recipients = verify: say RCPT but y: 550 5.1.1 no; ask a = bad; ask b = bad; ask c = bad; ask d = bad
  ask e = doubted; ask f = doubted; ask y = good; ask g = bad; heard RCPT TO:<[0-9a-f]{16}@ = 1
# a tarpit: the client is let go after 5 s, the answer is kept
recipients = verify: say RCPT 550 5.1.1 no; ask a = bad; pace 8; ask u = down; took = 5; +5s; knows u = False
# a message's refusal opens the question, no more
recipients = verify: put v; +2h; say RCPT 550 5.1.1 no; put u; +10s; heard RCPT TO:<u@ = 2; knows u = False
recipients = verify: put v; +2h; say RCPT 550 5.7.23 SPF; put u; +10s; heard RCPT TO:<u@ = 1; knows u = None
recipients = verify: put v; +2h; say RCPT 550 5.1.8 no; put u; +10s; heard RCPT TO:<u@ = 1; knows u = None
# the refusal that makes a primary rejecting is nobody's
recovery_grace = 0s | cutthrough = yes: put u; put v; put w; +10s; taken = 3; wait; say RCPT 550 5.1.1 gone
  put u; +5s; put v; +5s; put w; +5s; replied = 550 550 250; files = 1; logged : rejecting: 550 = 1
# a primary that hangs costs a client that waits for its word 30 s at most, and no mail
cutthrough = yes: wait; say . HANG; put u; +29s; replied =; +2s; replied = 250; down; say .; back
  +60s; taken = 1
cutthrough = yes: wait; say RCPT HANG; put u; +29s; replied =; +2s; replied = 250; down; back; +60s; taken = 1
cutthrough = yes: wait; hang 1; +29s; replied =; +2s; replied = 250; back; +60s; taken = 1
# a question that a dying connection left open is asked once more
recipients = verify: say RCPT once: CUT; ask u = good; dialled = 2
recipients = verify: say RCPT CUT; ask u = down; dialled = 2
# recipients put off behind accepted ones go at once, one with a 4xx of its own after its pause
put u; +2h; limit 2; put a b c; +1s; people = u, a b, c
put u; +2h; say RCPT to a: 450 4.2.0 grey; put a b; +290s; heard RCPT TO:<a@ = 1; people = u, b; +20s
  heard RCPT TO:<a@ = 2
# to nobody, nothing; a primary that offers DSN confirms by itself
lifetime = 1d: down; null; put u/NEVER; +25h; state = down 0, 2 expired; told =; files = 0
  logged double bounce = 1
offer DSN; put u/SUCCESS; +60s; taken = 1; told =
# what is too large, or SMTPUTF8 that is not offered, ends as a notice that says so; a SIZE of 10 is nonsense
lifetime = 1d: alone; offer SIZE 70000; large 80000; put u; +23h; taken = 1; +2h; state = up 0, 1 expired
  told = ABC001@sender.example 5.3.4
lifetime = 1d: alone; offer SIZE 10; large 50; put u; +23h; taken = 2; +2h; state = up 0; told =
lifetime = 1d: alone; offer SIZE; utf8; put u; +23h; taken = 1; +2h; state = up 0, 1 expired
  told = \xe9@sender.example 5.6.7
# a notice that nobody takes for five days goes to the postmaster, if there is one, and ends after five more
[defaults] | lifetime = 1d | probe_interval = 1h: down 1; +26h; told = ABC001@sender.example 4.4.7
  +96h; told = ABC001@sender.example 4.4.7; +26h; told =; files = 0; logged double bounce: dropped = 1
[defaults] | lifetime = 1d | probe_interval = 1h | [bounces] | postmaster = p@x.example: down 1; +26h
  told = ABC001@sender.example 4.4.7; +96h; told = ABC001@sender.example 4.4.7; +26h; told = p@x.example .*
  +144h; told =; files = 0; logged double bounce: dropped = 1
"""

    def test_stories(self):
        self.tell(self.STORIES)

    def test_one_that_ceases_to_reject_but_for_some_loses_nobodys_mail_however_rejecting_ended(self):
        for heal, left in (("say RCPT to b c d e: 550 half", 4), ("flush", 6), ("restart", 6)):
            self.tell("""
retry_interval = 1m | max_retry_interval = 1m | probe_interval = 1m: put a; put b; put c; put d; put e; +2h
  down 1; +1m; put a; put b; put c; put d; put e; back 550 half; +65m; state = rejecting 6; %s; +20m
  state = rejecting %d; back; +1h; state = up 0
""" % (heal, left))

    def test_one_message_holds_no_other_up(self):
        for way, said, known in cases(self, itertools.product(WAYS, ("CUT", "HANG"), ("", "put u; +5s; "))):
            sim = self.simulate()
            sim.extensions = way
            sim.tell(self, known + "say . to %d: %s; many 26" % (1 + bool(known), said))
            sim.tell(self, "+15s; taken = %d; say .; +700s; state = up 0" % (25 + bool(known)))

    def test_what_hangs_is_bounded_and_an_etrn_starts_a_fresh_connection(self):
        for known in cases(self, ["", "put u; +5s; "]):
            sim = self.simulate()
            sim.tell(self, known + "say . HANG; many 40")
            for number in range(40):
                before = len(sim.dials)
                sim.tell(self, "+5s" if number < 20 else "etrn; +5s")
                self.assertTrue(len(sim.puppets) <= 20 and (number <= 20 or len(sim.dials) > before))
            sim.tell(self, "say .; etrn; +30s; taken = 30")

    def test_what_the_dns_says_stays_in_its_line_of_the_log(self):
        sim = self.simulate()
        dial = sim.dial
        sim.dial = lambda plan: dial(plan)._replace(warning="no such name: x\nJan  1 forged")
        sim.tell(self, r"put u; +10s; taken = 1; logged no such name: x\\x0aJan = 1")

    def test_senders_double_up_to_their_number_over_connections_dialled_ahead_and_halved_ones_close(self):
        sim, seen = self.simulate(), []
        sim.tell(self, "down 200; +60s; back")
        while sim.one.entries:
            sim.run(0.05)
            seen.append((len(sim.taken), len(sim.offered) - len(sim.taken), len(sim.puppets)))
        self.assertTrue(all(senders <= max(1, 2 * taken) for taken, senders, _ in seen))
        self.assertEqual(max(senders for _, senders, _ in seen), 10)
        # while the canary is under way the others are dialled
        self.assertEqual(max(lines for taken, _, lines in seen if not taken), 10)
        self.assertEqual(max(lines for _, _, lines in seen), 10)
        # those of the outage, and one for each connection
        self.assertLess(len(sim.dials), 60 + 20)
        self.assertEqual(sim.taken[0], "ABC001")
        self.assertEqual(sorted(sim.taken), sorted(set(sim.taken)))
        sim.tell(self, "say . 451 4.3.0 later; many 150; +20s; open = [01]")
        sim = self.simulate()                   # a limit of a connection costs no time
        sim.script["MAIL"] = lambda id: len(sim.current.behind) >= 10 and "452 4.5.3 Too many messages"
        sim.tell(self, "many 100; +15s; taken = 100; logged status=deferred = 0")

    def test_a_primary_that_took_mail_is_not_down_because_another_connection_ends(self):
        for reach, story in cases(self, [
                (HANG, "many 3; +60s; taken = 3; state = up 0"),
                ("421 one at a time", "pace 12; many 4; +70s; taken = 4; state = up 0"),
                (None, "many 2; +1s; taken = 2; close; +1s; state = up 0"),
                (None, "usr1; +1s; open = 1; close; +1s; state = up 0; logged it hangs up = 0")]):
            sim = self.simulate()
            sim.reach = lambda name, sim=sim, reach=reach: reach if sim.puppets else None
            sim.close = lambda sim=sim: [puppet.on_end("") for puppet in list(sim.puppets)]
            sim.tell(self, story)

    def test_a_primary_that_is_slow_to_greet(self):
        for seconds, story in cases(self, [
                # is reached through a flood of ETRNs, and hangs up no later ETRN
                (lambda sim: 6, "down 1; +20s; back; etrn 200; taken = 1"),
                (lambda sim: 60 * (sim.taken == ["ABC001"] and len(sim.dials) < 2),
                 "put u; +10s; put u; +5s; etrn; +1s; taken = 2"),
                # gets no more than one message each probe_interval while it is rejecting
                (lambda sim: 6 * bool(sim.puppets), "down 9; +60s; turns; back 550; +8s; turns = 3 of 3")]):
            sim = self.simulate()
            sim.loop.in_thread = lambda work, then, sim=sim, seconds=seconds: sim.loop.later(
                seconds(sim), functools.partial(then, work()))
            sim.tell(self, story)

    def test_connections_dialled_ahead_to_a_former_primary_end(self):
        sim = self.simulate()
        sim.tell(self, "say . HANG; many 9; +5s; open = 9; say .")
        sim.queue.reconfigure(config("nameservers = 127.0.0.1:9", "primary = 192.0.2.2\nrecipients = any"))
        sim.tell(self, "open = 1; +5s; taken = 8; state = up 1")

    def test_who_comes_for_mail_gets_it_whatever_hangs(self):
        sim = self.simulate()
        sim.tell(self, "say . HANG; many 3; +5s; say .")
        with mock.patch.object(etrn, "greet", lambda *_: (greeted(sim, []), "")):
            sim.queue.run(sim.queue.deliveries.turn_around([sim.one], HOP, None, b"", lambda: None))
            sim.tell(self, "+2s; taken = 2")

    def test_many_dead_domains_keep_no_live_one_waiting_nor_one_another(self):
        dead = ["d%d.example" % number for number in range(40)]
        sim = self.simulate(*("[domain %s]\nprimary = 192.0.2.1" % one for one in dead))
        sim.reach = lambda name: HANG if name != DOMAIN else None
        with shorten(DIALS_MAX=12, DIALS_RESERVED=4):
            for number, one in enumerate(dead):
                sim.put(domain=one)
                sim.put("a@s%d.example" % number, domain="s%d.example" % number, kind="notice", sender="")
            sim.tell(self, "+400s; dialling = 8")
            for number in range(3):
                sim.tell(self, "put u; +1s; taken = %d; +20s" % (number + 1))
            failed = {one.name for one in sim.queue.destinations.all.values() if one.failures}
            self.assertLessEqual(set(dead), failed)
            sim.reach = lambda name: HANG if name not in (DOMAIN, dead[39]) else None
            sim.run(600)
        self.assertFalse(sim.queue.destinations.all[dead[39]].entries)

    def test_a_damaged_body_is_never_sent_and_who_is_done_with_is_not_sent_to(self):
        sim = self.simulate()
        sim.tell(self, "down 1; put a b; +5s")
        with open(os.path.join(sim.spool.path, "ABC001.eml"), "r+b") as file:
            file.write(b"X")
        sim.spool.record("ABC002", {}, {"a@" + DOMAIN: {"state": etrn.DELIVERED}})
        sim.tell(self, "back; +10s; state = up 0")
        self.assertEqual([(one[0][:6], one[1]) for one in sim.messages], [("ABC002", ["b@" + DOMAIN])])
        self.assertEqual((sim.queue.corrupt, spool_files(sim.spool.path)), (1, []))

    def test_who_is_told_what_is_as_notify_asks(self):
        events = ["failed", "delayed", "relayed"]
        for (notify, *counts), event in cases(self, itertools.product([
                ("", 1, 1, 0), ("NEVER", 0, 0, 0), ("FAILURE", 1, 0, 0), ("DELAY", 0, 1, 0),
                ("SUCCESS", 0, 0, 1), ("SUCCESS,FAILURE,DELAY", 1, 1, 1)], events)):
            sim = self.simulate("delay_notice = 4h\nprobe_interval = 1h\nlifetime = 2d")
            sim.reach = lambda name, event=event: None if name == DOMAIN and event == "relayed" else "refused"
            people = [("%s@%s" % (name, DOMAIN), notify, "rfc822;old+2B@x.example") for name in "uv"]
            sim.put(*people, envid="Q+2BX", ret="FULL")
            sim.tell(self, {"failed": "+49h", "delayed": "+24h", "relayed": "+1h"}[event])
            found = [(target, parts, *parts[1].get_payload()) for target, parts in sim.notices()
                     if parts[1].get_payload()[1]["Action"] == event]
            # one for both recipients, once
            self.assertEqual(len(found), counts[events.index(event)])
            for target, parts, whole, first, second in found:
                self.assertEqual((target, whole["Original-Envelope-Id"]), ("ABC001@sender.example", "Q+X"))
                self.assertEqual((second["Action"], first["Original-Recipient"]),
                                 (event, "rfc822; old+@x.example"))
                self.assertEqual((first["Status"][0], "Will-Retry-Until" in first),
                                 ("2" if event == "relayed" else "4", event == "delayed"))
                self.assertEqual(parts[2].get_content_type() == "message/rfc822",
                                 event == "failed")    # as RET says

    def test_a_primary_that_hangs_up_after_twenty_errors_lets_no_guess_pass(self):
        sim, errors = self.simulate("recipients = verify"), collections.Counter()

        def rcpt(address):
            errors[sim.current] += 1
            return "550 5.1.1 no" + "\n421 too many errors" * (errors[sim.current] == 20)
        sim.tell(self, "put known; +2h")                # else they would be doubted
        sim.script["RCPT"] = rcpt
        words = collections.Counter(sim.ask("g%d" % number) for number in range(100))
        self.assertEqual((words, sim.one.state), ({"bad": 100}, etrn.Primary.UP))


class Dialling(Relays):
    """dial(), on real sockets: whatever happens there says nothing about the mail."""

    def dial(self, *primaries, tls="none", **plan):
        cfg = config("", "primary = %s\ntls = %s" % (", ".join(one.address for one in primaries),
                                                     tls)).domain(DOMAIN)
        found = etrn.dial(make_plan(cfg, cfg.primary, **plan))
        self.assertTrue(found.error.isprintable() and len(found.error) < 1000)
        self.assertEqual(bool(found.error), found.client is None)
        if found.client is not None:
            self.addCleanup(found.client.close)
        return found

    def test_what_a_primary_may_say_before_the_mail(self):
        faults = [said for name, said in FAULTS.items() if name != "5xx"]
        for stage, said, is_there in cases(self, [
                ("greeting", "554 5.7.1 go away", False), ("greeting", "250 what", False),
                ("greeting", "220 Backup.Example.net hi", False),
                *(("greeting", said, False) for said in faults), *(("EHLO", said, False) for said in faults),
                *(("HELO", said, False) for said in ["550 no", *faults]), ("EHLO", "554 no", True),
                ("HELO", "250 x", True),
                *(("STARTTLS", said, said != "421 4.3.2 closing") for said in ["554 no", "250 ok",
                        *faults])]):
            others = {"EHLO": "502 what?"} if stage == "HELO" else {}
            primary = self.primary(**{stage: said}, **others).start()
            primary.extensions = ["SIZE", "STARTTLS"] if stage == "STARTTLS" else ["SIZE"]
            seconds = 20.0 if said is not HANG else 1.0 if is_there else 0.2    # then a second visit must do
            with shorten(COMMAND_S=seconds):
                found = self.dial(primary, tls="may")           # TLS that does not come about: in the clear
            self.assertEqual(found.client is not None, is_there, found.error)
            if said == "220 Backup.Example.net hi":
                self.assertIn("loops back", found.error)
            self.assertEqual("mail goes in the clear" in found.warning, is_there and stage == "STARTTLS")
            if is_there and stage == "STARTTLS":
                self.assertIn("starttls", found.client.esmtp_features)
            primary.stop()

        def drip(_):
            with contextlib.suppress(OSError):
                while True:
                    primary.clients[-1].sendall(b"2")
                    time.sleep(0.02)
            return CUT
        primary = self.primary(EHLO=drip).start()
        with shorten(COMMAND_S=0.3):
            self.assertIn("timed out", self.dial(primary).error)

    def test_the_next_host_is_tried_and_a_dead_one_costs_a_moment(self):
        down, cross, up = self.primary(), self.primary(greeting="554 not today"), self.primary().start()
        cross.start()
        found = self.dial(down, cross, up)
        self.assertEqual(([hop.port for hop in found.hops], found.client.hop.port),
                         ([one.port for one in (down, cross, up)], up.port))
        self.assertRegex(self.dial(down, cross).error,
                         r"connect to 127\.0\.0\.1:%d: Connection refused" % down.port)
        good, real = etrn.Hop("m.example", "127.0.0.1", up.port), socket.socket

        def without_ipv6(family=socket.AF_INET, *rest, **more):
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "Address family not supported")
            return real(family, *rest, **more)
        with mock.patch.object(etrn.socket, "socket", without_ipv6):
            hops = [etrn.Hop("m.example", "::1", 25), good]
            (_, error), (hop, sock) = itertools.islice(etrn.connect_each(hops, etrn.Dial()), 2)
        self.assertIsInstance(error, OSError)
        self.assertEqual(hop, good)
        # a power cut is noticed within a minute
        for name, value in etrn.KEEPALIVE if sys.platform == "linux" else ():
            self.assertEqual(sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)), value)
        self.assertTrue(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
        sock.close()
        with real() as deaf, shorten(STAGGER_S=0.1):
            deaf.bind(("127.0.0.1", 0))
            deaf.listen(0)
            dead = etrn.Hop("m.example", "127.0.0.1", deaf.getsockname()[1])
            full = [real() for _ in range(3)]
            # a listener whose queue is full answers no more, like a host that is not there
            for sock in full:
                sock.setblocking(False)
                sock.connect_ex(dead[1:])
            hop, sock = next(etrn.connect_each([dead, good], etrn.Dial()))
            self.assertEqual(hop, good)
            for one in [sock, *full]:
                one.close()

    def test_a_route_back_to_this_relay_is_refused(self):
        primary = self.primary().start()
        for host in cases(self, ["127.0.0.1", "0.0.0.0"]):
            found = self.dial(primary, listeners=(etrn.Endpoint(host, primary.port),))
            self.assertIn("loops back", found.error)
        self.assertFalse(primary.clients)

    def test_a_smarthost_gets_user_and_password_in_utf8_and_is_named_with_its_words(self):
        digest = base64.b64encode(
            ("\xfc " + hmac.new("p\xe4".encode(), b"<1@x>", "md5").hexdigest()).encode()).decode()
        for offered, script, said, error in cases(self, [
                ("PLAIN LOGIN", [(235, b"ok")], ["AUTH PLAIN AMO8AHDDpA=="], ""),
                ("LOGIN", [(334, b"VXNlcm5hbWU6"), (535, b"5.7.8 bad creds")], ["AUTH LOGIN w7w=", "cMOk"],
                 "535 5.7.8 bad creds"),
                ("CRAM-MD5", [(334, base64.b64encode(b"<1@x>")), (235, b"")], ["AUTH CRAM-MD5", digest], ""),
                ("GSSAPI", [], [], "it offers none of PLAIN, LOGIN, CRAM-MD5")]):
            client = etrn.Dialer("backup.example.net", HOP, mock.Mock())
            client.esmtp_features = {"auth": offered}
            client.ask = mock.Mock(side_effect=script)
            with contextlib.ExitStack() as stack:
                if error:
                    stack.enter_context(self.assertRaisesRegex(etrn.PeerError,
                            "AUTH at primary.example failed: " + error))
                client.log_in("\xfc", "p\xe4")
            self.assertEqual([" ".join(call[0]) for call in client.ask.call_args_list], said)

    def test_a_customer_that_is_gone_before_our_ehlo_is_no_bug(self):
        for early in cases(self, [b"", b"220 early\r\n", b"220 a\r\n250 b\r\n", b"garbage\r\n"]):
            ours, theirs = socket.socketpair()
            theirs.sendall(b"220 customer\r\n" if not early else b"")
            theirs.close()
            client, error = etrn.greet(make_plan(config().defaults, "atrn"), HOP, ours, "none", early)
            self.assertEqual((client, bool(error)), (None, True))


class PowerCutsAtThePrimary(Relays):
    """Machines are network namespaces.  A primary dies without a word when its end of the cable moves to the
    next one: this is the same machine after it has booted, and answers old packets by RST."""

    def setUp(self):
        super().setUp()
        if sys.platform != "linux":
            self.skipTest("network namespaces are Linux's")
        self.tool, self.libc = program("ip"), ctypes.CDLL(None)
        home, self.relays = self.here(), self.new_namespace()
        self.addCleanup(self.enter, home)
        # A neighbour that is known for good: packets to it vanish.  Else ARP would soon miss it.
        self.ip("link add near type veth peer name far address 02:00:00:00:00:02", "link set lo up",
                "link set near up", "address add 192.0.2.1/24 dev near",
                "neighbour add 192.0.2.2 lladdr 02:00:00:00:00:02 dev near nud permanent")
        self.end = self.relays

    def ip(self, *lines):
        for line in lines:
            done = subprocess.run([self.tool, *line.split()], stderr=subprocess.PIPE)
            if done.returncode:
                self.skipTest("ip %s: %s" % (line, done.stderr.decode("utf-8", "replace").strip()))

    def here(self):
        fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        self.addCleanup(os.close, fd)
        return fd

    def enter(self, namespace):
        self.assertEqual(self.libc.setns(namespace, 0x40000000), 0)     # CLONE_NEWNET

    def new_namespace(self):
        if self.libc.unshare(0x40000000):
            self.skipTest("we may not make network namespaces")
        return self.here()

    def cut_power(self):
        last, self.end = self.end, self.new_namespace()
        self.enter(last)
        self.ip("link set far netns /proc/%d/fd/%d" % (os.getpid(), self.end))
        self.enter(self.relays)

    def boot(self, **script):
        self.enter(self.end)
        self.ip("address add 192.0.2.2/24 dev far", "link set far up")
        machine = self.primary(where=("192.0.2.2", 25), **script).start()
        self.enter(self.relays)
        return machine

    def test_no_message_waits_for_one_that_hangs_and_that_one_goes_again(self):
        quick = list(zip([name for name, _ in etrn.KEEPALIVE], [1, 1, 3, 1500]))
        for late_s, keepalive, event, there in cases(self, [(0.2, [], "", "two"), (600, [], "ETRN", "two"),
                (600, quick, "", "one two"), (600, quick, "noticed", "one two")]):
            self.cut_power()            # a fresh machine
            before = self.boot(**{".": HANG})
            relay = self.relay(before, LATE_S=late_s, KEEPALIVE=keepalive, SWEEP_S=0.05, TRIGGER_S=0)
            relay.send()
            wait(lambda before=before: before.uses["."] and not re.search(
                ":0019 01 (?!0{8})", load("/proc/thread-self/net/tcp")), "the final dot and its ACK")
            self.cut_power()
            relay.send(b"Subject: two\r\n")
            if event == "noticed":
                relay.logged("lost connection with .*timed out")
            with relay.client() as client:
                machine = self.boot()
                client.say("ETRN " + DOMAIN if event == "ETRN" else "NOOP")
            wait(lambda relay=relay, most=not keepalive: len(relay.queue()) == most, "the mail to go")
            data = b"".join(sorted(data[data.index(b"Subject"):] for _, _, data in machine.messages))
            self.assertEqual(re.findall(r"Subject: (\w+)", data.decode()), there.split())
            relay.end(signal.SIGKILL)


class RoutesOfRelays(Relays):
    """Relays that find their primary in a scripted DNS; hosts have one port, on addresses of their own."""

    def setUp(self):
        super().setUp()
        self.mail = self.primary()
        self.zone = {
            (DOMAIN, etrn.MX): [(10, "mail.example"), (20, "a.example"), (20, "b.example")],
            ("mail.example", etrn.A): ["127.0.0.1"], ("a.example", etrn.A): ["127.0.0.2"],
            ("b.example", etrn.A): ["127.0.0.3"]}

    def mx_relay(self, dns, number, hostname, **limits):
        """A relay that is MX host 127.0.0.NUMBER, and takes our mail on another port."""
        return self.relay("mx", hostname=hostname, nameservers=str(dns.endpoint), SMTP_PORT=self.mail.port,
                          listen="127.0.0.1:0, 127.0.0.%d:%d" % (number, self.mail.port), **limits)

    def test_two_relays_of_equal_preference_never_exchange_mail_and_both_deliver(self):
        with Dns(self.zone) as dns:     # one is known by its name, the other by its address alone
            relays = [self.mx_relay(dns, 2, "a.example"), self.mx_relay(dns, 3, "unlisted.example")]
            for number in range(6):
                self.assertEqual(relays[number % 2].send(b"Subject: %d\r\n\r\n" % number)[:3], "250")
            for relay in relays:
                relay.logged(r": down: connect to mail\.example\[127\.0\.0\.1\]:\d+: Connection refused")
            best = self.zone[DOMAIN, etrn.MX].pop(0)            # the two alone are left
            for relay in relays:
                wait(lambda relay=relay: "loops back to this host" in "".join(relay.run("--flush",
                        DOMAIN)[1:]), "the loop")
                self.assertEqual(len(relay.queue()), 3)
            self.zone[DOMAIN, etrn.MX].insert(0, best)
            self.mail.start()
            for relay in relays:
                relay.signal(signal.SIGUSR1)
                relay.until_empty()
                self.assertEqual(relay.end(), 0)        # its log is whole then
                self.assertEqual(sum(": client=" in line for line in relay.log), 3)
            subjects = sorted(re.search(rb"Subject: (\d)", data).group(1) for _, _,
                              data in self.mail.messages)
            self.assertEqual(subjects, [b"%d" % number for number in range(6)])

    def test_the_last_route_serves_when_the_dns_dies_even_after_a_restart(self):
        self.mail.start()
        with Dns(self.zone) as dns:
            relay = self.mx_relay(dns, 2, "a.example", DNS_TOTAL_S=1.0, DNS_TRY_S=0.5)
            for dead in cases(self, ["", "silent", "no such name"]):
                if dead:
                    relay.start()
                relay.send()
                wait(lambda: self.mail.messages, "mail")
                relay.until_empty()
                if dead:
                    relay.logged("using the route that worked last")
                self.assertEqual(relay.end(), 0)
                self.mail.messages.clear()
                dns.mangle = (lambda packet: packet) if dead else lambda packet: None
                if dead:
                    self.zone.clear()


class Routes(unittest.TestCase):
    """find_route(), from the DNS to hosts in order."""
    MX = {"a": [(10, "m1"), (20, "m2")], "null": [(0, "")], "nulls": [(0, ""), (10, "m2")],
          "gone": [(1, "none")], "dry": [(10, "a")], "ours": [(5, "m1"), (10, "backup"), (10, "m2")],
          "only": [(1, "backup"), (2, "m2")], "half": [(1, "none"), (2, "m2")],
          "public": [(1, "m3"), (2, "m2")], "twin": [(10, "m2"), (10, "us")],
          "alias": [(5, "m1"), (10, "m2"), (10, "us"), (20, "m3")],
          "x": [(20, "m3"), (10, "m2"), (10, "bare")]}
    A = {"m1": ["192.0.2.1"], "m2": ["192.0.2.2"], "bare": ["192.0.2.3"], "backup": ["192.0.2.99"],
         "us": ["192.0.2.99"], "m3": ["127.0.0.1", "10.0.0.1", "9.9.9.9"]}

    def setUp(self):
        zone = {("m1.example", etrn.AAAA): ["2001:db8::1"]}
        for name, records in self.MX.items():
            zone[name + ".example", etrn.MX] = [(n, host and host + ".example") for n, host in records]
        zone.update({(name + ".example", etrn.A): addresses for name, addresses in self.A.items()})
        self.dns = enter(self, Dns(zone))

    def route(self, name, port="192.0.2.99", **plan):
        cfg = etrn.Destinations(config()).config_of(name)
        plan.update(resolver=etrn.Resolver((self.dns.endpoint,)), name=name, hostname="backup.example")
        hops, self.warning = etrn.find_route(make_plan(cfg, "mx", listeners=(etrn.Endpoint(port, 25),),
                                                       **plan))
        return " ".join("%s %s" % (hop.host.partition(".")[0], hop.address) for hop in hops)

    def test_routes_follow_mx_preferences_never_lead_here_and_fall_back_to_the_address(self):
        m1, m2 = "m1 192.0.2.1 m1 2001:db8::1", "m2 192.0.2.2"
        for name, port, expected in cases(self, [
                ("a.example", "", m1 + " " + m2), ("bare.example", "", "bare 192.0.2.3"),
                ("half.example", "", m2),
                ("ours.example", "", m1), ("nulls.example", "", m2), ("a.example", "192.0.2.2", m1),
                *[("alias.example", "192.0.2.99", m1)] * 8,             # equals come in any order
                ("notice:public.example", "", "m3 9.9.9.9")]):          # to public addresses only
            self.assertEqual(self.route(name, port=port or "192.0.2.77"), expected)
        seen = {" ".join(self.route("x.example").split()[:6:2]) for _ in range(40)}
        self.assertEqual(seen, {"bare m2 m3", "m2 bare m3"})

    def test_whatever_the_dns_says_the_mail_is_kept(self):
        for name, expected in cases(self, [
                ("only.example", "loops back"), ("null.example", "null MX"), ("none.example", "no such name"),
                ("gone.example", "none.example"), ("dry.example", "no address is known for a.example"),
                *[("twin.example", "loops back")] * 8, ("notice:dry.example", "no address|no route")]):
            with self.assertRaisesRegex(etrn.PeerError, expected):
                self.route(name)
        last = (etrn.Hop("old.example", "192.0.2.7", 25),)
        for name, warning in cases(self, [("none.example", "no such name"), ("dry.example", "no address")]):
            self.assertEqual(self.route(name, last_route=last), "old 192.0.2.7")
            self.assertIn(warning, self.warning)
        for label in cases(self, [b"a\xffb", b"a b", b"\0\0\0", b"-a-"]):       # a name that does not resolve
            self.dns.zone["x.example", etrn.MX] = [b"\0\x0a\x03" + label + b"\0"]
            with self.assertRaisesRegex(etrn.PeerError, "no such name|not a host name"):
                self.route("x.example")


# == 10. DNS ===================================================================

class Packets(unittest.TestCase):
    """Built by hand; nothing but DnsError may come of them."""

    HEAD = struct.pack("!HHHHHH", 7, 0x8180, 1, 1, 0, 0)
    ASKED = wire_name("a.example") + struct.pack("!HH", etrn.MX, 1)

    def parse(self, packet, kind=etrn.MX):
        return etrn.parse_answer(packet, 7, "a.example", kind)

    def records(self, kind, *records):
        answer = self.parse(dns_answer(7, "a.example", kind, records), kind)
        return answer.records, answer.name

    def test_a_query_is_a_question_and_nothing_else(self):
        self.assertEqual(etrn.format_query(7, "a.example", etrn.MX),
                         struct.pack("!HHHHHH", 7, 0x0100, 1, 0, 0, 0) + self.ASKED)
        for name in cases(self, ["", "a..example", ".", "a.", "x" * 64 + ".example", "\xe9.example",
                                 "ab." * 85 + "c"]):
            self.assertRaises(etrn.DnsError, etrn.format_query, 7, name, etrn.MX)

    def test_names_are_compared_without_case_and_compressed_ones_read(self):
        packet = (self.HEAD + wire_name("A.eXample") + struct.pack("!HH", etrn.MX, 1)
                  + b"\xc0\x0c" + struct.pack("!HHIH", etrn.MX, 1, 9, 6) + b"\0\x05\x01m\xc0\x0e")
        self.assertEqual(self.parse(packet).records, [(5, "m.example")])

    def test_aliases_are_followed_within_the_packet_and_records_of_others_are_left_out(self):
        b, c, back = (record(owner + ".example", etrn.CNAME, alias + ".example")
                      for owner, alias in ("ab", "bc", "ba"))
        end = record("c.example", etrn.A, "192.0.2.1")
        for given, expected in cases(self, [
                ([b, c, end], (["192.0.2.1"], "c.example")), ([end, c, b], (["192.0.2.1"], "c.example")),
                ([b], ([], "b.example")), ([c], ([], "a.example")),
                # of another owner, of another kind, of another class
                ([record("b.example", etrn.A, "192.0.2.9")], ([], "a.example")),
                ([record("a.example", etrn.AAAA, "::1")], ([], "a.example")),
                ([wire_name("a.example") + struct.pack("!HHIH", etrn.A, 3, 1, 4) + b"\1\2\3\4"],
                 ([], "a.example"))]):
            self.assertEqual(self.records(etrn.A, *given), expected)
        self.assertRaises(etrn.DnsError, self.records, etrn.A, b, back)         # a circle

    def test_packets_of_another_id_are_ignored_and_answers_to_another_question_are_none(self):
        good = dns_answer(7, "a.example", etrn.MX)
        for packet in cases(self, [b"", b"\0", dns_answer(8, "a.example", etrn.MX), b"\1\7" + good[2:]]):
            self.assertIsNone(self.parse(packet))
        for packet in cases(self, [
                good[:2], good[:11], good[:12], good[:20], dns_answer(7, "b.example", etrn.MX),
                dns_answer(7, "a.example", etrn.A), dns_answer(7, "a.example", etrn.MX, flags=0x0100),
                good[:4] + b"\0\0" + good[6:], good[:4] + b"\0\2" + good[6:], good[:-1] + b"\3"]):
            self.assertRaises(etrn.DnsError, self.parse, packet)
        self.assertIsNotNone(self.parse(good))

    def test_malicious_packets_are_refused(self):
        at = len(self.HEAD + self.ASKED)
        tail = struct.pack("!HHIH", etrn.MX, 1, 9, 4) + b"\0\1\1m"
        pointer = lambda target: struct.pack("!H", 0xc000 | target)        # noqa: E731
        for what, name in cases(self, [
                ("to itself", pointer(at)), ("forward", pointer(at + 2) + b"\0"), ("half of one", b"\xc0"),
                ("beyond the packet", pointer(0x3fff)),
                ("a circle of two", b"\1a" + pointer(at + 4) + pointer(at)),
                ("a label of kind 01", b"\x41a\0"), ("a label of kind 10", b"\x81a\0"), ("no end", b"\1a"),
                ("a label beyond the packet", b"\x3fab"), ("300 octets", (b"\x3f" + b"x" * 63) * 5 + b"\0")]):
            packet = self.HEAD + self.ASKED + name + (tail if what != "half of one" else b"")
            self.assertRaises(etrn.DnsError, self.parse, packet)
        for kind, data in cases(self, [
                (etrn.MX, b""), (etrn.MX, b"\0\1"), (etrn.MX, b"\0\1\5ab"),
                (etrn.MX, b"\0\1" + pointer(0x3fff)),
                (etrn.A, b"123"), (etrn.A, b"12345"), (etrn.AAAA, b"1234")]):
            self.assertRaises(etrn.DnsError, self.records, kind, record("a.example", kind, data))
        runs_over = record("a.example", etrn.MX, b"\0\1\1")
        self.assertRaises(etrn.DnsError, self.records, etrn.MX, runs_over,
                          record("a.example", etrn.MX, (9, "m.example")))
        packet = dns_answer(7, "a.example", etrn.MX)        # a count that lies
        self.assertRaises(etrn.DnsError, self.parse, packet[:6] + b"\xff\xff" + packet[8:])

    def test_answers_are_read_and_every_prefix_of_one_is_harmless(self):
        for kind, *data in cases(self, [
                (etrn.A, "192.0.2.1", "192.0.2.2"), (etrn.AAAA, "2001:db8::1"), (etrn.PTR, "host.example"),
                (etrn.MX, (10, "m1.example"), (20, "m2.example"), (0, ""))]):
            packet = dns_answer(7, "a.example", kind, [record("a.example", etrn.CNAME, "b.example"),
                                                       *[record("b.example", kind, one) for one in data]])
            for size in range(2, len(packet)):
                self.assertRaises(etrn.DnsError, self.parse, packet[:size], kind)
            self.assertEqual(self.parse(packet, kind).records, data)


class Nameservers(unittest.TestCase):
    """Questions to servers as they are: slow, lying, broken, knowing little, link-local."""

    ZONE = {
        ("a.example", etrn.MX): [(10, "m1.example"), (20, "m2.example")],
        ("m1.example", etrn.A): ["192.0.2.1"], ("m1.example", etrn.AAAA): ["2001:db8::1"],
        ("m2.example", etrn.A): ["192.0.2.2"], ("bare.example", etrn.A): ["192.0.2.3"]}
    MX = ZONE["a.example", etrn.MX]

    def dns(self, zone=None, **options):
        return enter(self, Dns(zone or self.ZONE, **options))

    def resolver(self, *servers):
        return etrn.Resolver(tuple(one.endpoint for one in servers or [self.dns()]))

    def test_records_come_over_udp_and_a_truncated_answer_over_tcp(self):
        for truncate, how in cases(self, [(False, ["udp"]), (True, ["udp", "tcp"])]):
            server = self.dns(truncate=truncate)
            self.assertEqual(self.resolver(server).query("A.example", etrn.MX), self.MX)
            self.assertEqual([how for how, _, _ in server.asked], how)

    def test_a_name_that_does_not_exist_is_an_error_and_one_without_records_is_not(self):
        with self.assertRaisesRegex(etrn.NoSuchName, "no such name"):
            self.resolver().query("none.example", etrn.MX)
        self.assertEqual(self.resolver().query("bare.example", etrn.MX), [])

    def test_the_next_server_is_asked_and_one_that_says_it_cannot_is_not_waited_for(self):
        bare = lambda rcode, questions=0: lambda packet: packet[:2] + struct.pack(      # noqa: E731
            "!HHHHH", 0x8180 | rcode, questions, 0, 0, 0)
        silent = [{"mangle": mangle} for mangle in (
            lambda packet: None, lambda packet: b"\0\0" + packet[2:] if packet[:2] != b"\0\0" else None)]
        broken = [{"rcode": 1}, {"rcode": 2}, {"rcode": 4}, {"rcode": 5}, *[{"mangle": mangle} for mangle in (
            bare(1), bare(2), bare(3), bare(1, 1), lambda packet: b"", lambda packet: packet[:20],
            lambda packet: packet[:2] + b"garbage", lambda packet: packet[:6] + b"\xff\xff" + packet[8:])]]
        for options in cases(self, silent + broken):
            first, began = self.dns(**options), time.monotonic()
            patience = 0.5 if options in silent else 2 * DEADLINE_S
            with shorten(DNS_TRY_S=patience, DNS_TOTAL_S=4 * DEADLINE_S):
                self.assertEqual(self.resolver(first, self.dns()).query("a.example", etrn.MX), self.MX)
            self.assertLess(time.monotonic() - began, DEADLINE_S)
            self.assertEqual(len(first.asked), 1)

    def test_nobody_answering_is_an_error_in_bounded_time(self):
        for mangle in cases(self, [lambda packet: None,         # the other: a bare header names nobody
                                   lambda packet: packet[:2] + b"\x81\x83" + b"\0" * 8]):
            silent = self.dns(mangle=mangle)
            with shorten(DNS_TRY_S=0.1, DNS_TOTAL_S=0.3), \
                    self.assertRaisesRegex(etrn.DnsError, "lookup of a.example failed") as caught:
                self.resolver(silent).query("a.example", etrn.MX)
            self.assertNotIsInstance(caught.exception, etrn.NoSuchName)

    def test_addresses_come_ipv4_first(self):
        resolver = self.resolver()
        for host, expected in cases(self, [
                ("m1.example", ["192.0.2.1", "2001:db8::1"]), ("M1.example.", ["192.0.2.1", "2001:db8::1"]),
                ("2001:DB8::2", ["2001:db8::2"]), ("FE80::1%eth0", ["fe80::1%eth0"])]):
            self.assertEqual(resolver.addresses(host), expected)
        self.assertRaisesRegex(etrn.DnsError, "no address is known for a", resolver.addresses, "a.example")
        for host in cases(self, ["", "a b", "x" * 64 + ".example", "\u202e.example", "a..b", "x" * 300,
                                 "-a.example", "a\r\nb"]):
            self.assertRaisesRegex(etrn.DnsError, "^not a host name: ", resolver.addresses, host)

    def test_a_nameserver_that_fails_at_ipv6_costs_neither_the_route_nor_much_time(self):
        server = self.dns(mangle=lambda packet: None if server.asked[-1][2] == etrn.AAAA else packet)
        with shorten(DNS_TRY_S=0.5):
            self.assertEqual(self.resolver(server).addresses("m1.example"), ["192.0.2.1"])
        self.assertLessEqual(sum(kind == etrn.AAAA for _, _, kind in server.asked), 2)

    def test_a_name_counts_where_it_leads_back_to_the_address(self):
        pointers = {"192.0.2.1": "M1.example", "192.0.2.2": "m1.example", "192.0.2.3": "none.example",
                    "192.0.2.4": b"\3a b\0", "fe80::1": "m6.example"}
        zone = {(ipaddress.ip_address(address).reverse_pointer, etrn.PTR): [name]
                for address, name in pointers.items()}
        zone.update({("m1.example", etrn.A): ["192.0.2.1"], ("m6.example", etrn.AAAA): ["fe80::1"]})
        server = self.dns(zone)
        for address, name in cases(self, [
                ("192.0.2.1", "m1.example"), ("192.0.2.2", ""), ("192.0.2.3", ""), ("192.0.2.4", ""),
                ("192.0.2.5", ""), ("fe80::1%eth0", "m6.example")]):
            self.assertEqual(self.resolver(server).name_of(address), name)
        self.assertRaises(etrn.DnsError, self.resolver(self.dns(rcode=2)).name_of, "192.0.2.1")

    def test_a_resolv_conf_names_its_servers(self):
        with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
            file.write("# x\nsearch example\nnameserver 192.0.2.53\nnameserver fe80::1%eth0\tx\nnameserver\n"
                       "nameserver nonsense\nnameserver ::1\nnameserver 192.0.2.54\n")
            file.flush()
            self.assertEqual(etrn.read_resolv_conf(file.name),
                             (("192.0.2.53", 53), ("fe80::1%eth0", 53), ("::1", 53)))
        self.assertEqual(etrn.read_resolv_conf("/nowhere/resolv.conf"), (("127.0.0.1", 53),))

    def test_an_alias_alone_is_followed(self):
        long = {("n%d.example" % at, etrn.CNAME): ["n%d.example" % (at + 1)] for at in range(20)}
        aliases = {"x": "y.example", "y": "a.example", "lost": "none.example", "dry": "bare.example",
                   "c0": "c0.example", "c1": "c2.example", "c2": "c1.example", "root": b"\0",
                   "odd": b"\2\xffa\0"}
        short = {(owner + ".example", etrn.CNAME): [alias] for owner, alias in aliases.items()}
        server = self.dns({**self.ZONE, **long, **short})
        for name, expected in cases(self, [("x.example", self.MX), ("dry.example", [])]):
            self.assertEqual(self.resolver(server).query(name, etrn.MX), expected)
        for name, expected in cases(self, [
                ("c0.example", "aliases have no end"), ("c1.example", "aliases have no end"),
                ("n0.example", "aliases have no end"),
                ("lost.example", "no such name: none.example"), ("odd.example", "no such name|not a name"),
                ("root.example", "not a name")]):
            del server.asked[:]
            with self.assertRaisesRegex(etrn.DnsError, expected):
                self.resolver(server).query(name, etrn.MX)
            self.assertLessEqual(len(server.asked), 10)

    def test_link_local_addresses_have_a_zone(self):
        number, interface = socket.if_nameindex()[0]
        for host, *expected in cases(self, [
                ("127.0.0.1", socket.AF_INET, ("127.0.0.1", 25)), ("::1", socket.AF_INET6, ("::1", 25, 0, 0)),
                ("fe80::1%" + interface, socket.AF_INET6, ("fe80::1", 25, 0, number))]):
            self.assertEqual(etrn.socket_address(host, 25), tuple(expected))
        for host in cases(self, ["fe80::1%nowhere", "name.example", "localhost", "1.2.3.4.5"]):
            self.assertRaises(OSError, etrn.socket_address, host, 25)
        there = socket.AF_INET, tuple(self.dns().endpoint)
        with mock.patch.object(etrn, "socket_address", return_value=there) as address:
            found = etrn.Resolver([etrn.Endpoint("fe80::1%eth0", 53)]).query("a.example", etrn.MX)
        self.assertEqual((found, address.call_args[0]), (self.MX, ("fe80::1%eth0", 53)))

    def test_a_file_is_asked_for_all_questions_and_only_resolv_conf_itself_means_the_system(self):
        server = self.dns({**self.ZONE, ("localhost", etrn.A): ["192.0.2.77"]})
        with mock.patch.object(etrn, "read_resolv_conf", return_value=(server.endpoint,)):
            self.assertEqual(etrn.Resolver("/etc/other.conf").addresses("localhost"), ["192.0.2.77"])
            self.assertEqual([kind for _, _, kind in server.asked], [etrn.A, etrn.AAAA])
            del server.asked[:]
            self.assertIn("127.0.0.1", etrn.Resolver("/etc/resolv.conf").addresses("localhost"))
            self.assertEqual(server.asked, [])
            self.assertEqual(etrn.Resolver("/etc/resolv.conf").query("a.example", etrn.MX), self.MX)
        number, interface = socket.if_nameindex()[0]                    # which gives zones, too
        both = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1", 0, 0, number)),
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0))]
        with mock.patch.object(socket, "getaddrinfo", return_value=both):
            found = etrn.Resolver("/etc/resolv.conf").addresses("nas.local")
        self.assertEqual(found, ["192.0.2.1", "fe80::1%" + interface])


# == 11. DSN ===================================================================

HOSTILE = ["550 5.1.1 x\r\nBcc: v@other.example\r\n\r\nhello", "550 \r\n--BOUND/backup.example.net--\r\n", "",
           "550 \x00\x1b[2J \u202e", "550 caf\xe9 \ud83d \U0001f600", "x" * 100000, "\U0001f600" * 400,
           "550 =?utf-8?q?a?=\n\tb", "\0" * 400]


def verdict(**values):
    whole = etrn.Verdict("u@" + DOMAIN, "refused", "5.1.1", "550 5.1.1 no such user", "mail.ourdom.example")
    return whole._replace(**values)


def notice(verdicts, original=MESSAGE, full=False, action="failed", person=None, **sidecar):
    """A notice, parsed by a stranger, and its octets.  `person` and `sidecar`: values in the sidecar."""
    people = [{"address": one.address, "orcpt": "", "attempts": 3, "last_attempt": 1764400000.0,
               "expires": 1764600000.0, **(person or {})} for one in verdicts]
    whole = {"id": "ABCDEF", "sender": "a@sender.example", "received": 1764000000.0, "envid": "",
             "smtputf8": False, "recipients": people, **sidecar}
    target = whole["sender"] or "postmaster@here.example"
    data = etrn.format_notice("backup.example.net", target, whole, action, verdicts, original, full,
                              1764500000.0, "BOUND", "mid")
    return email.message_from_bytes(data, policy=email.policy.default), data


def parts_of(message):
    """The words of the text, the fields of the first recipient, what is returned."""
    text, status, returned = message.iter_parts()
    return " ".join(text.get_content().split()), status.get_payload()[1], returned


class Notices(unittest.TestCase):
    """Well-formed for strangers, harmless whatever is quoted, and plain to a layman."""

    def test_a_notice_is_a_multipart_report(self):
        second = verdict(address="v@" + DOMAIN, response="timeout", remote="", status="4.4.7")
        message, _ = notice([verdict(), second], envid="QQ+2B1", person={"orcpt": "rfc822;u+2Bx@old.example"})
        self.assertEqual((message.get_content_type(), message.get_param("report-type"), message.defects),
                         ("multipart/report", "delivery-status", []))
        for name, value in cases(self, [
                ("To", "a@sender.example"), ("Message-ID", "<mid@backup.example.net>"),
                ("From", "Mail Delivery System <MAILER-DAEMON@backup.example.net>"),
                ("Subject", "Undelivered Mail Returned to Sender"), ("Auto-Submitted", "auto-replied")]):
            self.assertEqual(str(message[name]), value)
        text, status, headers = message.iter_parts()
        self.assertEqual([part.get_content_type() for part in (text, status, headers)],
                         ["text/plain", "message/delivery-status", "text/rfc822-headers"])
        self.assertEqual(headers.get_payload(decode=True), MESSAGE)
        self.assertIn("u@" + DOMAIN, text.get_content())
        whole, *both = status.get_payload()
        arrival = email.utils.parsedate_to_datetime(whole["Arrival-Date"])
        self.assertEqual((whole["Reporting-MTA"], whole["Original-Envelope-Id"], arrival.timestamp()),
                         ("dns; backup.example.net", "QQ+1", 1764000000.0))
        for name, *values in cases(self, [
                ("Final-Recipient", "rfc822; u@" + DOMAIN, "rfc822; v@" + DOMAIN),
                ("Action", "failed", "failed"),
                ("Original-Recipient", "rfc822; u+x@old.example", "rfc822; u+x@old.example"),
                ("Status", "5.1.1", "4.4.7"), ("Remote-MTA", "dns; mail.ourdom.example", None),
                ("Will-Retry-Until", None, None),
                ("Diagnostic-Code", "smtp; 550 5.1.1 no such user", "X-etrn-relay; timeout")]):
            self.assertEqual([one[name] for one in both], values)
        last = email.utils.parsedate_to_datetime(both[0]["Last-Attempt-Date"])
        self.assertEqual(last.timestamp(), 1764400000.0)

    def test_each_action_has_its_status_its_subject_and_its_words(self):
        for action, status, expected, subject, words in cases(self, [
                ("failed", "5.1.1", "5.1.1", "Undelivered", "It will not be tried again"),
                ("failed", "", "5.0.0", "Undelivered", "could not be delivered to"),
                ("delayed", "5.1.1", "4.1.1", "Delayed", "You need not send it again"),
                ("delayed", "", "4.0.0", "Delayed", "It will be tried until"),
                ("relayed", "2.1.5", "2.0.0", "relayed", "sends no confirmations")]):
            message, _ = notice([verdict(status=status)], action=action)
            text, fields, _ = parts_of(message)
            self.assertEqual((fields["Status"], fields["Action"]), (expected, action))
            self.assertTrue(subject in message["Subject"] and words in text)
            until = email.utils.formatdate(1764600000.0, localtime=True) if action == "delayed" else None
            self.assertEqual(fields["Will-Retry-Until"], until)

    def test_foreign_text_puts_neither_header_nor_part_into_the_notice_nor_breaks_its_form(self):
        table = itertools.product(("failed", "delayed", "relayed"), (False, True), ("", "\u00e9"),
                                  [*HOSTILE, "x" * 380 + " y"])
        original = b"Subject: one\r\nX-Long: " + b"y" * 5000 + b"\r\n\r\nHello.\r\n"
        for action, full, accent, text in cases(self, table):
            one = verdict(response=text, remote=text, status=text[:50], address="u%s@%s" % (accent, DOMAIN))
            orcpt = "a\r\nb;" + text.encode("ascii", "replace").decode()
            message, data = notice([one, verdict()], original, full, action, person={"orcpt": orcpt},
                                   envid="a+0D+0ABcc:+20v")
            _, status, _ = message.iter_parts()
            self.assertEqual((message["Bcc"], len(status.get_payload())), (None, 1 if accent else 3))
            strict = email.message_from_bytes(data, policy=email.policy.strict)
            kinds = [part.get_content_maintype() for part in strict.get_payload()]
            self.assertEqual((kinds[:2], data.isascii()), (["text", "message"], not accent))
            self.assertNotRegex(data, rb"\r(?!\n)|(?<!\r)\n|\0|\x1b|(?mi:^bcc:)")
            ours = data[:data.index(b"Undelivered Message")] if full else data
            self.assertLessEqual(max(map(len, ours.split(b"\r\n"))), 998)

    def test_lines_of_a_notice_are_not_too_long_for_smtp(self):
        for local in cases(self, ["u", "u" * 1900, "\U0001f600" * 450, '"' + "a b" * 600 + '"']):
            one = verdict(address="%s@%s" % (local, DOMAIN), response="550 " + "w " * 200, remote="h" * 300)
            _, data = notice([one], person={"orcpt": "utf-8;%s@x.example" % local}, sender=one.address)
            self.assertLessEqual(max(map(len, data.split(b"\r\n"))), 998)
        message, data = notice([verdict(response="550 5.1.1 " + "word " * 60)])
        fields = parts_of(message)[1]
        self.assertEqual(fields["Diagnostic-Code"].split(), ["smtp;", "550", "5.1.1", *["word"] * 60])
        self.assertLessEqual(max(map(len, data.split(b"\r\n"))), 78)
        header = b"X-Long: " + b"y" * 5000 + b"\r\nX-Short: 1\r\n" + b"Z: " + b"z" * 990 + b"\r\n"
        folded = parts_of(notice([verdict()], header)[0])[2].get_payload(decode=True)
        self.assertLessEqual(max(map(len, folded.split(b"\r\n"))), 998)
        self.assertEqual(folded.replace(b"\r\n ", b""), header)
    def test_the_text_is_true_for_the_postmaster_and_where_nobody_refused_or_nothing_was_tried(self):
        never = {"attempts": 0, "last_attempt": None}
        words = "Returned by the postmaster of the backup mail server"
        for response, options, there, absent in cases(self, [
                ("550 no", {"sender": ""}, "For the postmaster: a message of ", "will not be tried"),
                (words, {"person": never}, "postmaster of the backup mail server returned it",
                 "collected|refused the message"),
                (etrn.UNCOLLECTED, {"person": never}, "It waited for 5 days and 18 hours to be collected",
                 "returned it")]):
            one = verdict(status="5.0.0", response=response, remote="")
            text = parts_of(notice([one], **options)[0])[0]
            self.assertIn(there, text)
            self.assertNotRegex(text, absent)

    def test_a_layman_is_told_what_happened_and_what_to_do(self):
        for status, response, happened, to_do in cases(self, [
                ("5.1.1", "550 5.1.1 unknown", "no such mailbox", "letter by letter"),
                ("5.1.10", "550 5.1.10 RecipientNotFound", "no such mailbox", "letter by letter"),
                ("4.4.7", "452 4.2.2 over quota", "mailbox is full", "send it again later"),
                ("5.2.1", "550 5.2.1 disabled", "takes no mail", "ask"),
                ("5.3.4", "message of 9 octets exceeds the primary's limit", "larger than", "smaller"),
                ("5.6.7", "the primary does not offer SMTPUTF8", "letters that", "plain letters"),
                ("5.7.1", "554 5.7.1 spam", "does not want this message", "by telephone"),
                ("4.4.7", "connect to h[192.0.2.1]:25: Connection timed out", "does not answer", "later"),
                ("4.4.7", "connect to 192.0.2.1: Connection refused", "mail service is not running", "later"),
                ("4.4.7", "connect to h[192.0.2.1]:25: No route to host", "cannot be reached", "later"),
                ("4.4.7", "no such name: x.example", "cannot be found", "later"),
                ("4.4.7", "lookup of x.example failed: Name or service", "cannot be found", "later"),
                ("4.4.7", "mail for x loops back to this host", "other than its backup servers", "later"),
                ("4.4.7", "x.example has a null MX record: it says it takes no mail", "takes no mail", "ask"),
                ("4.4.7", "lost connection with h", "broke the conversation off", "later"),
                ("4.4.7", "450 4.7.1 greylisted", "does not want", "ask"),
                ("4.4.7", "451 later", "put the message off", "later"),
                ("5.0.0", "550 no", "refused the message", "ask")]):
            text = parts_of(notice([verdict(status=status, response=response, remote="")],
                                   person={"attempts": 41})[0])[0]
            for words in (happened, to_do, "will not be tried again", "The last result was: " + response,
                          "It was tried for 5 days and 18 hours (41 attempts, the last time on"):
                self.assertIn(words, text)

    def test_the_words_that_a_meaning_is_known_by_are_said_somewhere(self):
        """They are our own or the system's, and would be forgotten when a text changes."""
        source = load(SOURCE)
        before, _, after = re.split(r"(?ms)^(# == \d+\. DSN =+$.*?)(?=^# == )", source)
        spoken = before + after + "\n".join(map(os.strerror, errno.errorcode))
        patterns = [pattern for pattern, _, _ in etrn._MEANINGS if pattern[:1] not in ("^", "")]
        for phrase in cases(self, "|".join(patterns).split("|")):
            self.assertIn(phrase, spoken)
            meaning = etrn.meaning_of(verdict(status="4.4.7", response=phrase))[0]
            self.assertNotRegex(meaning, "refused the message|put the message off")

    def test_the_types_of_rfc_6533_only_where_they_are_needed(self):
        """Many programs read the old ones alone."""
        plain, accent = b"Subject: x\r\n\r\ncaf\xc3\xa9\r\n", b"Subject: caf\xc3\xa9\r\n\r\nx\r\n"
        for address, orcpt, shown, expected in cases(self, [
                ("u", "", None, ""), ("u", "rfc822;u@x.example", "rfc822; u@x.example", ""),
                ("u", "utf-8;u@x.example", "utf-8; u@x.example", ""), ("u", "x400;c=de", "x400; c=de", ""),
                ("u", "UTF-8;u@x.example", "UTF-8; u@x.example", ""),
                ("u", "utf-8;\\x{FC}@x.example", "utf-8; \\x{FC}@x.example", ""),
                ("u", "utf-8;ü@x.example", "utf-8; \\x{FC}@x.example", "global-"),
                ("é+x", "", None, "global-")]):
            one = verdict(address=address + "@" + DOMAIN)
            message, data = notice([one], person={"orcpt": orcpt}, smtputf8=True)
            final = "rfc822; u@" if address == "u" else "utf-8; \\x{E9}\\x{2B}x@"
            self.assertIn("Final-Recipient: %s%s\r\n" % (final, DOMAIN), data.decode())
            originals = re.findall("Original-Recipient: (.*)\r\n", data.decode())
            self.assertEqual(originals, [shown] if shown else [])
            text, status, _ = message.iter_parts()
            self.assertEqual(status.get_content_type(), "message/%sdelivery-status" % expected)
            self.assertEqual(message.get_param("report-type"), "delivery-status")
            self.assertEqual(data.isascii(), address == "u")
            self.assertIn("<%s@%s>" % (address, DOMAIN), text.get_content())
        for original, full, smtputf8, expected in cases(self, [
                (plain, False, True, "text/rfc822-headers"), (plain, True, True, "message/rfc822"),
                (accent, False, False, "text/rfc822-headers"), (accent, True, False, "message/rfc822"),
                (accent, False, True, "message/global-headers"), (accent, True, True, "message/global")]):
            message, data = notice([verdict()], original, full, smtputf8=smtputf8, sender="é@sender.example")
            self.assertEqual(parts_of(message)[2].get_content_type(), expected)
            encodings = [part["Content-Transfer-Encoding"] for part in (message, *message.iter_parts())]
            self.assertEqual(encodings, ["8bit", None, None, "8bit"])
            self.assertTrue(b"To: <\xc3\xa9@sender.example>\r\n" in data and original.rstrip() in data)


# == 12. RELAY =================================================================

def read(sock):
    try:
        return sock.recv(65536)
    except OSError:
        return b""


def read_all(sock):
    """What comes until it is closed or reset."""
    return b"".join(iter(functools.partial(read, sock), b""))


def without_received(data):
    """The message without its first Received field."""
    return re.sub(rb"\AReceived:[^\r]*(?:\r\n[ \t][^\r]*)*\r\n", b"", data)


ENVELOPE = "MAIL FROM:<>", "RCPT TO:<u@ourdom.example>"


class Life(Relays):
    """Mail waits and arrives, through restarts, kills, commands, reloads, stops and bugs."""

    BODIES = [MESSAGE, b"", b"\r\n", b".\r\n..\r\n...\r\n", b"Subject: \xff\r\n\r\n\x01 caf\xe9\r\n",
              b"Received: from elsewhere\r\n\tby x; y\r\n\r\n", b"S: x\r\n\r\n" + b"y" * 300000 + b"\r\n",
              # other people's signatures hold
              b"DKIM-Signature: v=1; a=rsa-sha256; d=sender.example;\r\n\tbh=AAAA;\r\n b=BBBB\r\nFrom:  A  "
              b"<a@sender.example>\r\nSubject: folded\r\n\tand   spaced\r\n\r\n.\r\n..two\r\n"
              b" \t blanks \t\r\ncaf\xe9 \xff\r\n%s\r\n\r\nFrom me\r\n\r\n\r\n" % (b"x" * 900)]

    def test_mail_taken_while_the_primary_is_down_arrives_when_it_is_back(self):
        primary = self.primary()
        relay = self.relay(primary)
        people = ["user@" + DOMAIN, "other@" + DOMAIN]
        for body in self.BODIES:
            self.assertRegex(relay.send(body, recipients=people), r"\A250 2\.0\.0 .*queued as [0-9A-F]+\Z")
        with relay.client() as client:
            client.say("MAIL FROM:<a@sender.example>", *("RCPT TO:<%s>" % one for one in people))
            for part, last in ((self.BODIES[-1][:777], b""), (self.BODIES[-1][777:], b" LAST")):
                client.raw(b"BDAT %d%s\r\n" % (len(part), last) + part)
                self.assertEqual(client.reply()[:3], "250")
        relay.logged(r"primary\[\d+\]: ourdom\.example: down: connect to .*: Connection refused")
        self.assertEqual(len(relay.files()), 2 * len(self.BODIES) + 2)
        primary.start()
        relay.until_empty()
        arrived = [data for *_, data in primary.messages]
        self.assertEqual({data[:28] for data in arrived}, {b"Received: from client.exampl"})
        self.assertEqual(sorted(map(without_received, arrived)), sorted(self.BODIES + self.BODIES[-1:]))
        self.assertEqual({(one[0], *one[1]) for one in primary.messages}, {("a@sender.example", *people)})
        relay.logged(r"primary\[\d+\]: ourdom\.example: up after .*, \d+ messages waiting")
        relay.logged(r"smtp\[\d+\]: [0-9A-F]+: to=<user@ourdom\.example>, relay=127\.0\.0\.1\[127\.0\.0\.1\]:"
                     r"\d+, delay=.*, dsn=2\.0\.0, status=sent \(250 ")
        relay.logged(r"qmgr\[\d+\]: [0-9A-F]+: removed")

    def test_a_message_to_two_domains_becomes_two_that_wait_for_their_own_primaries(self):
        one, two = self.primary(), self.primary()
        relay = self.relay(one, domain="[domain two.example]\nprimary = %s\n" % two.address)
        relay.send(recipients=["a@" + DOMAIN, "b@two.example", "c@" + DOMAIN])
        rows = {row["domain"]: [one["address"] for one in row["recipients"]] for row in relay.queue()}
        self.assertEqual(rows, {DOMAIN: ["a@" + DOMAIN, "c@" + DOMAIN], "two.example": ["b@two.example"]})
        self.assertEqual((len({row["id"] for row in relay.queue()}), len(relay.files())), (2, 4))
        status = relay.json("--status")
        self.assertEqual((status["spool"]["messages"], status["spool"]["bytes"]),
                         (2, sum(one["bytes"] for one in status["domains"].values())))
        one.start()
        wait(lambda: [row["domain"] for row in relay.queue()] == ["two.example"], "the second half to remain")
        two.start()
        relay.until_empty()
        (_, people, data), (_, others, same) = one.messages[0], two.messages[0]
        self.assertEqual((people, others, data), (rows[DOMAIN], rows["two.example"], same))

    def test_a_queue_survives_a_restart_and_its_pairs_a_journey_to_another_relay(self):
        primary, other = self.primary(), self.primary().start()
        relay, second = self.relay(primary, STOP_DISK_S=1.5), self.relay(other)
        for number in range(3):
            relay.send(sender="%d@x.example" % number)
        held = relay.queue()[0]["id"]
        self.assertEqual(relay.run("--hold", held)[0], 0)
        time.sleep(1.6)                 # a disk that had nothing to do for so long still answers
        self.assertEqual((relay.end(), [line for line in relay.log if "disk" in line]), (0, []))
        for name in relay.files():
            shutil.copy2(relay.at(name), second.spool)
        second.signal(signal.SIGHUP)
        primary.start()
        relay.start()
        for one in cases(self, (second, relay)):
            wait(lambda one=one: len(one.files()) == 2, "the pair of the held one alone")
            self.assertEqual([(row["id"], row["state"]) for row in one.queue()], [(held, "held")])
            one.run("--release", held)
            wait(one.is_empty, "an empty spool")
        for one in cases(self, (primary, other)):
            self.assertEqual([sender[0] for sender, *_ in one.messages], ["1", "2", "0"])
            self.assertEqual({without_received(data) for *_, data in one.messages}, {MESSAGE})
        self.assertEqual(relay.json("--status")["domains"][DOMAIN]["accepted"], 3)

    def test_a_relay_killed_while_delivering_sends_little_twice_and_loses_nothing(self):
        """What is not written down yet may come twice, and nothing else."""
        primary = self.primary()
        relay = self.relay(primary, domain="connections = 2", UNRECORDED_MAX=10)
        sent = {b"Subject: %d\r\n\r\n%s\r\n" % (number, b"%d" % number * 100) for number in range(120)}
        with relay.client() as client:
            self.assertEqual({client.send(data)[:3] for data in sent}, {"250"})
        primary.start()
        for goal in (5, 40, 80):
            wait(lambda goal=goal: len(primary.messages) >= goal, "deliveries")
            relay.end(signal.SIGKILL)
            relay.start()
        relay.until_empty()
        self.assertEqual({without_received(data) for _, _, data in primary.messages}, sent)
        # At each kill: what the disk had not taken, and one on each connection.
        self.assertLessEqual(len(primary.messages), len(sent) + 3 * (10 + 2))

    def test_etrn_sigusr1_and_the_primarys_own_connection_deliver_all_but_held_mail_at_once(self):
        def etrn_from_elsewhere(relay):
            with Wire(relay.port, "127.0.0.9") as wire:
                self.assertEqual(wire.say("HELO gw", "ETRN @" + DOMAIN)[:3], "250")
        for act, said in cases(self, [
                (etrn_from_elsewhere, r"etrn: site=@ourdom\.example, client=\S+, messages=1, reply=250"),
                (lambda relay: relay.signal(signal.SIGUSR1), "signal: site=all, messages=2"),
                (lambda relay: relay.client().close(), "")]):
            primary = self.primary()
            relay = self.relay(primary, domain="probe_interval = 1h", PROBE_FIRST_S=3600.0)
            relay.send(sender="held@x.example")
            relay.logged(": down: ")
            relay.run("--hold", relay.queue()[0]["id"])
            relay.send()
            primary.start()
            act(relay)
            wait(lambda relay=relay: len(relay.files()) == 2, "all but the held one to leave")
            self.assertEqual([sender for sender, *_ in primary.messages], ["a@sender.example"])
            relay.logged(said and r"flush\[\d+\]: " + said)

    def test_sighup_takes_all_or_nothing(self):
        other, port = self.path("other.log"), unused_port()
        relay = self.relay(relay="max_connections = 2")
        self.assertEqual(self.rcpt(relay, "u@new.example"), ["554 5.7.1"])
        self.let_in(relay, 2)
        self.reload(relay, "configuration reread", relay="max_connections = 3", domain="[domain new.example]")
        with socket.create_server(("127.0.0.1", 0)) as taken:
            for options, domain, error in cases(self, [
                    ("", "nonsense = 1", r"etrn\.conf:\d+: unknown option 'nonsense'"),
                    ("log = %s/x.log" % other, "", "%s/x.log: No such file" % other),
                    ("odmr_listen = 127.0.0.1:%d, 127.0.0.1:%d" % (port, taken.getsockname()[1]), "",
                     "cannot listen on .*: Address already in use"),
                    ("odmr_listen = 127.0.0.1:%d" % relay.port, "", "the relay itself has that port")]):
                self.reload(relay, r"error: not reloaded, the old configuration stays: .*" + error,
                            relay="max_connections = 4\n" + options, domain=domain)
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            self.fail("a port of the refused configuration is open")
        self.let_in(relay, 3)
        self.assertEqual(self.rcpt(relay, "u@new.example"), ["250 2.1.5"])
        self.reload(relay, relay="log = " + other, domain="")
        wait(lambda: os.path.exists(other) and os.path.getsize(other), "the new log")

    def test_a_stop_lets_a_message_end_takes_no_other_and_waits_for_nobody_who_hangs(self):
        primary = self.primary(**{".": HANG}).start()
        relay = self.relay(primary)
        relay.send()
        wait(lambda: primary.uses["."], "a delivery under way")
        with relay.client() as idle, relay.client() as busy, relay.client() as slow:
            for client in (busy, slow):
                client.say(*ENVELOPE, "DATA")
                client.raw(b"half a mess")
            relay.signal(signal.SIGTERM)
            self.assertEqual((idle.reply()[:9], idle.reply()), ("421 4.3.2", ""))
            busy.raw(b"age\r\n.\r\n")
            self.assertEqual(busy.reply()[:3], "250")
            self.assertEqual((busy.say("MAIL FROM:<>")[:9], busy.reply()), ("421 4.3.2", ""))
            self.assertEqual((relay.process.wait(5.0), slow.reply()[:9]), (0, "421 4.3.2"))
        self.assertEqual((len(relay.files()), os.listdir(relay.at("incoming"))), (4, []))

    def test_a_bug_costs_its_session_and_no_other(self):
        def broken(*_):
            return 1 // 0
        for target, commands in cases(self, [
                (mock.patch.dict(etrn.COMMANDS, {b"NOOP": (broken, etrn.ANY)}), ["NOOP"]),
                (mock.patch.object(etrn.SmtpServer, "_judge_mail", broken), ["EHLO x", "MAIL FROM:<>"]),
                (mock.patch.object(etrn.Queue, "accept", broken), ["EHLO x", *ENVELOPE, "BDAT 0 LAST"])]):
            with Local(self.folder) as local, Wire(local.port) as one, Wire(local.port) as two:
                with target:
                    self.assertEqual((one.say(*commands)[:9], one.reply()), ("421 4.3.0", ""))
                self.assertEqual(two.say("NOOP")[:3], "250")
            self.assertEqual(sum("bug: " in line for line in local.log), 1)


class Local:
    """The relay in a thread of this process, where its functions can be replaced."""

    def __init__(self, folder, relay="", domain=""):
        self.cfg = config("listen = 127.0.0.1:0\nmin_free_space = 0\nnameservers = 127.0.0.1:9\n" + relay,
                          "primary = 127.0.0.1:9\nrecipients = any\ncutthrough = no\n" + domain,
                          os.path.join(folder, "etrn.conf"))
        self.log = []

    def __enter__(self):
        self.spool = opened(self.cfg.spool)
        log = etrn.Log("stderr", "info", "x")

        def keep():
            self.log.extend(log.lines)
            log.lines.clear()
        log.flush = keep
        self.server = server = etrn.Server(self.cfg, self.spool, log)
        server.certificate = server.load_certificate(self.cfg)
        server.recipient_files, server.logins = server.read_files(self.cfg)
        server.listen(self.cfg)
        self.port = server.queue.listeners[0].port
        self.thread = threading.Thread(target=server.run, daemon=True)
        self.thread.start()
        wait(lambda: server.queue.loader.loads and not server.queue.loader.is_busy, "the spool to be read")
        return self

    def __exit__(self, *_):
        self.server.loop.post(self.server.begin_stop)       # as SIGTERM does
        self.thread.join(DEADLINE_S)
        self.spool.close()

    def half_kept(self):
        return os.listdir(os.path.join(self.spool.path, "incoming")) + list(self.spool.bodies)

    def body(self, id):
        return pathlib.Path(self.spool.path, id + ".eml").read_bytes()


class Wired(Relays):
    """What the session is shown to do, over a connection, where the server acts after it has gone on."""

    def exchange(self, local, stream):
        """The replies' last lines to all of it in one piece; the client sends no more after that."""
        with Wire(local.port) as wire:
            wire.raw(stream)
            wire.sock.shutdown(socket.SHUT_WR)
            text = wire.lines.read().decode("utf-8")
        return [wire.greeting] + [line for line in text.split("\r\n") if line[3:4] == " "]

    def bodies(self, local):
        """What was kept, without our Received fields, oldest first; it is gone then."""
        names = spool_files(local.spool.path)
        out = [without_received(local.body(name[:-4])) for name in names if name.endswith(".eml")]
        for name in names:
            os.remove(os.path.join(local.spool.path, name))
        return out

    def test_every_dialogue_comes_out_the_same(self):
        for options in cases(self, [{}, {"bare_newline": "reject"}, {"size_limit": 1000}]):
            lines = "max_message_size = %(size_limit)d\nbare_newline = %(bare_newline)s" % dict(
                {"size_limit": 0, "bare_newline": "normalize"}, **options)
            wanted = [sent for name, sent, its in SCRIPTS if its == options
                      and name != "without a limit any size is taken"]      # the disk's size is one
            self.assertGreater(len(wanted), 3)
            with Local(self.folder, lines, DIALOGUE_DOMAINS) as local:
                for self.sent in wanted:
                    player, said = play(self.sent, **options), self.exchange(local, self.sent)
                    self.assertEqual([one[0] for one in said], [one[0] for one in player.replies], self.sent)
                    self.assertEqual(self.bodies(local), player.bodies)
                self.assertEqual(local.half_kept(), [])
            self.no_bugs(local.log)

    def test_what_is_taken_back_after_it_went_to_the_spool_leaves_nothing_there(self):
        """Whatever part of a body the spool has when the client goes on."""
        with shorten(SPILL_OCTETS=1000), Local(self.folder) as local, Wire(local.port) as client:
            client.say("EHLO x")
            for size in cases(self, range(700, 1100, 10)):
                client.say(*ENVELOPE)
                client.raw(b"BDAT %d\r\n%sRSET\r\nMAIL FROM:<>\r\n" % (size, b"x" * size))
                self.assertEqual([client.reply()[:3] for _ in range(3)], ["250"] * 3)
                client.say("RSET")
            self.assertEqual(client.send(MESSAGE)[:3], "250")       # the spool has done all before it
            self.assertEqual(local.half_kept(), [])

    def test_what_does_no_harm_goes_on_as_it_came(self):
        """What the world sends and standards forbid: octets in, and octets out at a primary.  Contract 4."""
        primary = self.primary().start()
        relay = self.relay(primary, domain="[domain xn--mnchen-3ya.example]\nprimary = " + primary.address)
        verp, a, u, body = "v" * 300, "<a@b.example>", "<u@ourdom.example>", b"S: x\r\n"
        with relay.client() as client:
            for mail, rcpt, data, sender, recipient, arrived in cases(self, [
                    ("<%s@b.example>" % verp, "<%s@ourdom.example>" % verp, body, None, None, body),
                    ("<a..b@B.example>", "<.a.@ourdom.example>", body, None, None, body),
                    ("<a@xn--strae-oqa.example>", u, body, None, None, body),
                    ("<a@straße.example> SMTPUTF8", "<ü@münchen.example>", body, None, None, body),
                    (a + " SMTPUTF8", u, b"S: \xc3\xbc\r\n", None, None, b"S: \xc3\xbc\r\n"),
                    (a + " SMTPUTF8", u, body, a, u, body), (a[1:-1], u[1:-1], body, a, u, body),
                    ("<a@b.example.>", "<u@ourdom.example.>", body, a, u, body),
                    ("\t<a@b.example>\t", "\t \t<u@ourdom.example> \t\r", body, a, u, body),
                    (a + " AUTH=<>", u, body, a, u, body),
                    (a + " ENVID=x+2by RET=hdrs", u + " ORCPT=rfc822;u+3dv@x", body,
                     a + " RET=HDRS ENVID=x+2By", u + " ORCPT=rfc822;u+3Dv@x", body),
                    (a, u, b" by evil; x\r\n", a, u, b"\r\n by evil; x\r\n"),
                    (a, u, b"\0From a\n>From b\r\n", a, u,
                     b"X-Mailbox-Line: From a\r\nX-Mailbox-Line: >From b\r\n"),
                    (a, u, body + b"\r\nFrom a\r\n", a, u, body + b"\r\nFrom a\r\n"),
                    (a, u, b"\r\na\n..b\r\n...c\r\nd\r\0e\r\r\n", a, u, b"\r\na\r\n.b\r\n..c\r\nd e \r\n")]):
                del primary.log[:]
                sent = len(primary.messages)
                opening = "mail FROM:%s\r\nRCPT\tTO:%s\r\nDATA \r\n" % (mail, rcpt)
                client.raw(opening.encode() + data + b".\r\n")
                self.assertEqual([client.reply()[:3] for _ in range(4)], ["250", "250", "354", "250"])
                wait(lambda sent=sent: len(primary.messages) > sent, "the message")
                said = [re.sub(" (SIZE=[0-9]+|BODY=8BITMIME)", "", line) for line in primary.log]
                self.assertIn("MAIL FROM:" + (sender or mail), said)
                self.assertIn("RCPT TO:" + (recipient or rcpt), said)
                self.assertEqual(without_received(primary.messages[-1][2]), arrived)


class Names(Relays):
    """Of clients, from their PTR records: contract 5, Trace."""

    def ask(self, names, primary, gate=None, **options):
        """A relay whose nameserver knows these names of 127.0.0.1, 127.0.0.2 and so on, once `gate` is open.
        Each leads to the address that it begins with."""
        zone = {}
        for number, name in enumerate(names, 1):
            zone["%d.0.0.127.in-addr.arpa" % number, etrn.PTR] = [name]
            zone[name, etrn.A] = ["127.0.0." + name.partition(".")[0].strip("-")]
        self.dns = enter(self, Dns(zone, mangle=lambda packet: (
            packet if gate is None or gate.wait(DEADLINE_S) else None)))
        return self.relay(primary, nameservers=str(self.dns.endpoint), **options)

    def test_a_name_that_leads_back_stands_in_received_and_log_and_is_asked_for_once(self):
        primary = self.primary().start()
        relay = self.ask(["1.mx.example", "2.mx.example", "99.mx.example", "-4.mx.example"], primary)
        for number, name in cases(self, [(1, r"1\.mx\.example"), (2, r"2\.mx\.example"), (3, "unknown"),
                                         (4, "unknown"), (5, "unknown")]):
            since, sent = len(relay.log), len(primary.messages)
            with Wire(relay.port, "127.0.0.%d" % number) as client:
                self.assertEqual((client.say("EHLO x")[:3], client.send(MESSAGE)[:3]), ("250", "250"))
            where = r"%s ?\[127\.0\.0\.%d\]" % (name, number)
            relay.logged(r"smtpd\[\d+\]: [0-9A-F]+: client=" + where, since)
            wait(lambda sent=sent: len(primary.messages) > sent, "the mail")
            self.assertRegex(primary.messages[-1][2].decode(), r"\AReceived: from x \(%s\)\r\n" % where)
        asked = len(self.dns.asked)
        for number in range(50):                # a flood of clients is no flood of questions
            Wire(relay.port, "127.0.0.%d" % (number % 5 + 1)).close()
        self.assertEqual((relay.send()[:3], len(self.dns.asked)), ("250", asked))

    def test_a_name_is_waited_for_a_second_and_one_that_comes_late_answers_no_other_question(self):
        gate, word = threading.Event(), threading.Event()
        primary = self.primary(RCPT=lambda argument: "450 4.2.0 " + "later" * word.wait(DEADLINE_S)).start()
        relay = self.ask(["1.mx.example"], primary, gate, domain=Recipients.VERIFY,
                         DNS_TRY_S=15.0, NAME_WAIT_S=0.3, NAMES_AT_ONCE=3)
        began = time.monotonic()
        clients = [enter(self, Wire(relay.port, "127.0.0.%d" % number)) for number in (*range(1, 8), 1)]
        for client in clients:
            client.raw(b"EHLO x\r\nMAIL FROM:<>\r\n")
        self.assertEqual([client.reply()[:3] for client in clients * 2], ["250"] * 16)
        self.assertTrue(0.2 < time.monotonic() - began < DEADLINE_S / 2)
        client.raw(b"RCPT TO:<u@ourdom.example>\r\n")
        wait(lambda: primary.uses["RCPT"], "the question")
        gate.set()                              # the names come, and then the primary's word
        wait(lambda: self.rcpt(relay, "u@x.example") and "from 1.mx.example[" in relay.log[-1], "the name")
        word.set()
        self.assertEqual(client.reply()[:9], "450 4.1.1")
        self.assertEqual(len({name for _, name, kind in self.dns.asked if kind == etrn.PTR}), 3)
        self.no_bugs(relay.log)


# -- TLS

class Secured(Relays):
    """Tests with certificates: files one.pem, one.key, two.pem and two.key."""
    PIN = hashlib.sha256(ssl.PEM_cert_to_DER_cert(PEMS["one.pem"])).hexdigest()

    def setUp(self):
        super().setUp()
        for name, text in PEMS.items():
            save(self.path(name), text)

    def install(self, certificate="one"):
        """Put a pair where the relay's is, as a renewal does."""
        for kind in ("pem", "key"):
            shutil.copy(self.path("%s.%s" % (certificate, kind)), self.path("new"))
            os.replace(self.path("new"), self.path("relay." + kind))

    def tls_section(self, name="one"):
        return "[tls]\ncertificate = %s\nkey = %s\n" % (self.path(name + ".pem"), self.path(name + ".key"))

    def local(self, relay=""):
        self.install()
        return Local(self.folder, relay, self.tls_section("relay"))


class TlsWire(Wire):
    """A client that has said EHLO and, unless it says otherwise, STARTTLS."""

    def __init__(self, port, secure=True, **options):
        super().__init__(port)
        self.say("EHLO client.example")
        if secure:
            assert self.say("STARTTLS")[:3] == "220"
            self.handshake(**options)

    def handshake(self, **options):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
        for name, value in options.items():
            setattr(context, name, value)
        self.lines.close()
        self.sock = context.wrap_socket(self.sock)
        self.lines = self.sock.makefile("rb")

    def rest(self):
        """All that still comes until the relay closes."""
        try:
            return self.lines.read()
        except OSError:
            return b""


class TlsClients(Secured):
    """STARTTLS at our door: nothing leaks in, nothing is lost, renewals are seen."""

    def test_a_session_over_tls_is_shown_in_received_and_sidecar(self):
        with self.local() as local, TlsWire(local.port, secure=False) as client:
            self.assertIn("STARTTLS", client.say("EHLO client.example").replace("250-", "").split("\n"))
            self.assertEqual(client.say("STARTTLS now")[:9], "501 5.5.4")
            self.assertEqual(client.say("STARTTLS")[:9], "220 2.0.0")
            client.handshake()
            self.assertEqual(client.say("MAIL FROM:<>")[:9], "503 5.5.1")
            self.assertNotIn("STARTTLS", client.say("EHLO again.example"))
            self.assertEqual(client.say("STARTTLS")[:9], "503 5.5.1")
            id = client.send(MESSAGE).split()[-1]
            version = client.sock.version()
            self.assertEqual(local.spool.read_sidecar(id)["client"], {
                "address": "127.0.0.1", "helo": "again.example", "tls": version, "name": "unknown"})
            self.assertIn(version, ("TLSv1.2", "TLSv1.3"))
            self.assertRegex(
                local.body(id).decode(), r"\AReceived: from again\.example \(unknown \[127\.0\.0\.1\]\)\r\n\t"
                r"\(using %s with cipher [A-Z0-9_-]+\)\r\n\tby .* with ESMTPS id %s\r\n" % (version, id))
            self.no_bugs(local.log)

    def test_what_comes_behind_starttls_in_the_clear_is_never_a_command(self):
        with self.local() as local:
            for injected, ahead in cases(self, itertools.product(
                    [b"NOOP\r\n", b"RSET\r\nMAIL FROM:<>\r\n", b"\r\n", b"\x16\x03\x01", b"QUIT\r\n" * 3000],
                    [[], [b"NOOP\r\n"]])):
                with TlsWire(local.port, secure=False) as client:
                    client.raw(b"".join(ahead) + b"STARTTLS\r\n" + injected)
                    replies = [client.reply()[:9] for _ in (*ahead, "STARTTLS")]
                    self.assertEqual((replies[-1], client.rest()), ("501 5.5.1", b""))
            for injected in cases(self, [b"NOOP\r\n", b"MAIL FROM:<>\r\n" * 50]):    # after our 220
                with TlsWire(local.port, secure=False) as client:
                    client.say("STARTTLS")
                    client.raw(injected)
                    with contextlib.suppress(OSError, ValueError):      # an alert, or nothing
                        self.assertNotRegex(client.rest(), rb"(?m)^[245]\d\d ")
            self.assertEqual(spool_files(local.spool.path), [])
            self.no_bugs(local.log)

    def test_all_that_was_said_before_tls_is_forgotten_but_errors_count(self):
        opening = ["MAIL FROM:<a@b.example>", "RCPT TO:<u@%s>" % DOMAIN]
        with self.local() as local:
            for before in cases(self, [["NOOP"], opening, [*opening, "BDAT 8\r\nthrown"], ["WHAT"] * 5]):
                with TlsWire(local.port, secure=False) as client:
                    self.assertEqual(client.say(*before, "STARTTLS")[:9], "220 2.0.0")
                    client.handshake()
                    for command in (*opening, "DATA", "ETRN " + DOMAIN):
                        self.assertEqual(client.say(command)[:9], "503 5.5.1")
                    self.assertEqual(client.say("EHLO x", "DATA")[:9], "503 5.5.1")
                    id = client.send(MESSAGE).split()[-1]
                    self.assertEqual(without_received(local.body(id)), MESSAGE)
                    errors = ["WHAT"] * (6 if before[0] != "WHAT" else 1)
                    self.assertEqual((client.say(*errors)[:9], client.rest()), ("421 4.7.0", b""))

    def test_a_handshake_that_fails_or_stalls_costs_its_own_session_alone(self):
        said = [b"SOMEFAILINGHANDSHAKE\r\n", b"\x16\x03\x01\x40\x00" + b"\0" * 50, b"\x16\x03", b"",
                b"\x15\x03\x03\x00\x02\x02\x28", b"\x16\x03\x01\x02\x00\x01"]
        with shorten(SWEEP_S=0.05), self.local() as local, TlsWire(local.port) as good, \
                shorten(HANDSHAKE_S=0.3):       # not for the good one, on a slow machine
            good.say("EHLO x")
            others = [enter(self, TlsWire(local.port, secure=False)) for _ in range(40)]
            for client, data in zip(others, itertools.cycle(said)):
                client.say("STARTTLS")
                client.raw(data)
            others[9].sock.shutdown(socket.SHUT_WR)
            self.assertEqual(good.send(MESSAGE)[:3], "250")
            for client in others:
                self.assertNotRegex(client.rest(), rb"(?m)^[245]\d\d ")
            wait(lambda: local.server.smtp.open == len(local.server.smtp.clients) == 1, "the others to go")
            self.no_bugs(local.log)

    def test_old_protocols_and_renegotiation_are_refused(self):
        with self.local() as local:
            for version in cases(self, ["TLSv1", "TLSv1_1", "TLSv1_2", "TLSv1_3"]):
                with TlsWire(local.port, secure=False) as client, warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)
                    client.say("STARTTLS")
                    bounds = dict.fromkeys(("minimum_version", "maximum_version"), ssl.TLSVersion[version])
                    if version in ("TLSv1", "TLSv1_1"):
                        self.assertRaises(OSError, client.handshake, **bounds)
                    else:
                        client.handshake(**bounds)
                        self.assertEqual(client.say("NOOP")[:3], "250")
            wait(lambda: sum("TLS handshake failed" in line for line in local.log) == 2, "both in the log")
            options = local.server.certificate.context.options
            self.assertTrue(options & getattr(ssl, "OP_NO_RENEGOTIATION", 0x40000000))

    def test_a_renewed_certificate_is_used_and_a_broken_one_is_not(self):
        def shown():
            with TlsWire(local.port) as client:
                self.assertEqual(client.say("NOOP")[:3], "250")
                found = ssl.DER_cert_to_PEM_cert(client.sock.getpeercert(True))
                return next(name for name, text in PEMS.items() if text == found)
        with self.local() as local:
            self.assertEqual(shown(), "one.pem")
            self.install("two")
            self.assertEqual(shown(), "two.pem")
            for text in cases(self, [PEMS["one.pem"], PEMS["one.pem"][:200], "", "-----BEGIN CERTIFICATE\n"]):
                save(self.path("relay.pem"), text)            # not the key's, half written, empty
                self.assertEqual({shown() for _ in range(3)}, {"two.pem"})
            os.unlink(self.path("relay.key"))
            self.assertEqual({shown() for _ in range(2)}, {"two.pem"})
            self.install("one")
            self.assertEqual(shown(), "one.pem")
            said = [line.partition("]: ")[2][:30] for line in local.log if "certificate" in line]
            renewed = ["certificate renewed\n"]
            self.assertEqual(said, renewed + ["warning: the certificate canno"] * 5 + renewed)

    def test_sighup_takes_a_new_certificate_and_refuses_a_bad_one(self):
        self.install()
        relay = self.relay(domain=self.tls_section("relay"))
        for name, text in (("relay.pem", "half"), ("locked.pem", PEMS["one.pem"]),
                           ("locked.key", LOCKED_KEY)):
            save(self.path(name), text)
        for name, said in cases(self, [
                ("absent", "not reloaded, .* stays: certificate "),
                ("locked", "not reloaded, .* stays: certificate "), ("relay", "configuration reread")]):
            self.reload(relay, said, domain=self.tls_section(name))
            with TlsWire(relay.port) as client:
                self.assertEqual(client.say("NOOP")[:3], "250")
        relay.logged("the certificate cannot be read, the old one stays: certificate ")     # said once
        with TlsWire(relay.port, secure=False) as early:
            self.reload(relay, "configuration reread", domain="")
            with relay.client() as client:
                self.assertEqual(client.say("STARTTLS")[:3], "502")
            self.assertEqual(early.say("STARTTLS")[:3], "220")      # what was offered holds

    def test_nothing_is_lost_of_what_waits_for_a_reader_or_the_disk_or_lies_in_the_tls_layer(self):
        opening, body = "\r\n".join([*ENVELOPE, ""]).encode(), b"x" * 70 + b"\r\n"
        data = b"".join(b"%06d %s\r\n" % (number, b"y" * 60) for number in range(6000))
        append = etrn.Spool.append

        def slowly(*arguments):
            time.sleep(0.02)
            return append(*arguments)
        few = shorten(OUTPUT_MAX=256, UNWRITTEN_MAX=20000, SPILL_OCTETS=9000)
        for secure in cases(self, (True, False)):
            with few, mock.patch.object(etrn.Spool, "append", slowly), self.local() as local, \
                    TlsWire(local.port, secure) as client:
                client.say("EHLO x")
                client.raw(opening + b"BDAT 0\r\n" * 2000)          # no other record comes to wake the relay
                self.assertEqual({client.reply()[:3] for _ in range(2002)}, {"250"})
                client.say("RSET")
                client.raw(opening + b"DATA\r\n" + body * 100 + b".\r\nNOOP\r\n"
                           + opening + b"BDAT 7200 LAST\r\n" + body * 100 + b"NOOP\r\n" * 50)
                replies = [client.reply()[:3] for _ in range(58)]
                self.assertEqual(replies, ["250"] * 2 + ["354"] + ["250"] * 55)
                id = client.send(data).split()[-1]
                self.assertEqual((client.say("NOOP")[:3], without_received(local.body(id))), ("250", data))
                if not secure:                  # an SSLSocket is for one thread alone
                    flood = opening + b"BDAT 0\r\n" * 30000         # more than all buffers hold
                    threading.Thread(target=client.raw, args=(flood,), daemon=True).start()
                    self.assertEqual({client.reply()[:3] for _ in range(30002)}, {"250"})


class SecurePrimary(Primary):
    """It offers STARTTLS.  Script verbs of its own: "STARTTLS", and "TLS", said instead of a handshake."""

    def __init__(self, certificate, **script):
        super().__init__(**script)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate, certificate.replace(".pem", ".key"))
        self.connections = self.secured = 0

    def _talk(self, sock, more=("STARTTLS",)):
        self.connections += 1
        if super()._talk(sock, more):
            if "TLS" in self.script:
                self._say(sock, "TLS", "", "")
            with self.context.wrap_socket(sock, server_side=True) as secure:
                self.clients.append(secure)
                self.secured += 1
                super()._talk(secure)
        return False


class TlsPrimaries(Secured):
    """The `tls` option of a domain."""

    def secure_primary(self, **script):
        return self.primary(SecurePrimary, self.path("one.pem"), **script)

    def deliver(self, primary, policy, trusted=""):
        """Whether a message could be delivered, or why not.  `trusted`: the only authority's certificate."""
        cfg = config("", "primary = localhost:%d\ntls = %s" % (primary.port, policy)).domain(DOMAIN)
        store = {"SSL_CERT_FILE": self.path(trusted + ".pem"), "SSL_CERT_DIR": self.path("none")}
        with mock.patch.dict(os.environ, store):
            client, error, *_ = etrn.dial(make_plan(cfg, (etrn.Endpoint("127.0.0.1", primary.port),)))
        if client is not None:
            with client:
                client.sendmail("a@b.example", "u@" + DOMAIN, MESSAGE)
        return len(primary.messages) == 1, error

    def test_each_policy_with_a_primary_that_offers_tls(self):
        for policy, trusted, secured, error in cases(self, [
                ("none", "", 0, ""), ("may", "", 1, ""), ("require", "", 1, ""), ("verify", "one", 1, ""),
                ("verify", "", 0, "TLS with .* failed"), ("verify", "two", 0, "TLS with .* failed"),
                ("sha256:" + self.PIN, "", 1, ""),
                ("sha256:" + bytes.fromhex(self.PIN).hex(":").upper(), "", 1, ""),
                ("sha256:" + "00" * 32, "", None, "is not the pinned one: sha256:" + self.PIN)]):
            primary = self.secure_primary().start()
            is_sent, problem = self.deliver(primary, policy, trusted)
            self.assertEqual((is_sent, primary.connections), (not error, 1), problem)
            self.assertIn(secured, (primary.secured, None))
            self.assertRegex(problem, error or r"\A\Z")

    def test_only_may_goes_on_in_the_clear_and_on_a_new_connection(self):
        faults = [
            {"STARTTLS": "454 4.7.0 not now"}, {"STARTTLS": "500 5.5.1 no"}, {"STARTTLS": CUT}, {"TLS": CUT},
            {"TLS": "no ServerHello"}, {"STARTTLS": b"220 go\r\n250 INJECTED\r\n"}, None]
        policies = "may", "require", "verify", "sha256:" + "00" * 32
        for fault, policy in cases(self, itertools.product(faults, policies)):
            primary = (self.primary() if fault is None else self.secure_primary(**fault)).start()
            is_sent, error = self.deliver(primary, policy)
            self.assertEqual((is_sent, bool(error)), (policy == "may", policy != "may"))
            self.assertNotIn("INJECTED", error)
            if fault is None:
                self.assertEqual("does not offer STARTTLS" in error, policy != "may")
            else:
                self.assertEqual((primary.secured, primary.connections), (0, 2 if policy == "may" else 1))

    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "no /proc")
    def test_a_primary_that_stops_reading_is_left_after_its_time(self):
        over = threading.Event()
        primary = self.secure_primary(extensions=["CHUNKING", "PIPELINING"],
                                      RCPT=lambda argument: str(over.wait(DEADLINE_S)))
        self.addCleanup(over.set)
        relay = self.relay(primary.start(), domain="tls = require", BLOCK_S=3.0, SWEEP_S=0.1)
        self.assertEqual(relay.send(b"y" * 8000000 + b"\r\n")[:3], "250")       # more than all buffers hold
        wait(lambda: primary.uses["RCPT"], "the question")
        used = processor_s(relay)
        relay.logged("down: conversation with .* timed out")
        self.assertLess(processor_s(relay) - used, 1.0, "it waits without turning")
        self.assertEqual(len(relay.files()), 2)


class Attacks(Relays):
    """What the network may do costs little, and costs others nothing."""

    def test_mail_is_refused_where_the_disk_is_short_or_one_client_sends_too_much(self):
        for options, replies in cases(self, [
                ({"min_free_space": "1000000G"}, {"452 4.3.1"}),
                ({"relay": "max_message_rate = 2"}, {"250 2.1.0", "450 4.7.1"}),
                ({"relay": "max_message_rate = 2\ntrusted_clients = 127.0.0.0/8"}, {"250 2.1.0"})]):
            with self.relay(**options).client() as client:      # the minute may end meanwhile, once
                self.assertEqual({client.say("RSET", "MAIL FROM:<>")[:9] for _ in range(6)}, replies)
                self.assertEqual(client.say("NOOP")[:3], "250")

    def test_connections_are_limited_for_one_client_and_for_all(self):
        for option, most in cases(self, [("max_connections_per_client = 2", 2), ("max_connections = 2", 2),
                                         ("max_connections_per_client = 1\nmax_connections = 3\n"
                                          "trusted_clients = 127.0.0.0/8", 3)]):
            relay = self.relay(relay=option)
            for _ in range(2):              # who has left makes room
                self.let_in(relay, most)

    def test_who_is_idle_too_long_is_told_421(self):
        """And who sends an octet now and then, at every stage; but not who sends message after message."""
        relay = self.relay(relay="command_timeout = 2s", LINGER_S=0.3)
        stages = [b"", b"", b"EHLO x\r\nNO", OPENING + b"DATA\r\n", OPENING + b"BDAT 99999\r\n",
                  b"EHLO x\r\nBDAT 9999\r\n", b"EHLO x\r\n" + b"z" * 5000, OPENING + b"DATA\r\nSubject: "]
        busy, *socks = self.opened(relay, 1 + len(stages))
        heard, left, end = dict.fromkeys(socks, b""), set(socks), time.monotonic() + DEADLINE_S
        for sock, stage in zip(socks, stages):
            sock.sendall(stage)
        for number in itertools.count():
            if number % 5 == 0:
                busy.sendall((b".\r\n" if number else b"") + OPENING + b"DATA\r\n")
                if not left or time.monotonic() > end:
                    break
            busy.sendall(b"y" * 98 + b"\r\n")
            for sock in select.select(left, [], [], 0.05)[0]:
                data = read(sock)
                heard[sock] += data
                left -= set() if data else {sock}
            for sock, octet in zip(socks, [b"", *[b"x"] * 6, b"\0"]):
                with contextlib.suppress(OSError):
                    sock.sendall(octet)
            time.sleep(0.05)
        for sock in cases(self, socks):
            self.assertIn(b"421 4.4.2", heard[sock])
        self.assertEqual(left, set())
        busy.sendall(b".\r\nQUIT\r\n")
        replies = read_all(busy)
        self.assertEqual((b"421" in replies, b"\n221" in replies), (False, True))
        self.assertEqual(self.kept(relay), 2 * replies.count(b"queued"))

    def flood(self, relay, lines):
        """Ten clients that send so much, and read nothing.  How many octets went out."""
        total = 0
        for sock in self.opened(relay, 10):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            left = OPENING + lines
            with contextlib.suppress(BlockingIOError):
                while left:
                    left = left[sock.send(left):]
            total += len(lines) - len(left)
        return total

    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "no /proc")
    def test_a_flood_of_commands_is_served_a_little_at_a_time(self):
        relay, sample = self.relay(), b"BDAT 0\r\n" * 8000
        began = processor_s(relay)
        sock, = self.opened(relay, 1)
        sock.sendall(OPENING + sample + b"QUIT\r\n")
        self.assertIn(b"\r\n221 ", read_all(sock))
        cost = (processor_s(relay) - began) / len(sample)       # of an octet, on this machine
        sent = self.flood(relay, sample * 5)
        used = processor_s(relay)
        self.assertEqual(relay.send()[:3], "250")
        self.assertLess(processor_s(relay) - used, sent * cost / 2)

    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "no /proc")
    def test_clients_that_never_read_cost_little_and_are_cut_off(self):
        relay = self.relay(relay="command_timeout = 1s", LINGER_S=0.3)
        before = memory_mb(relay)
        self.flood(relay, b"RCPT TO:<%s@other.example>\r\n" % (b"x" * 1900) * 10000)
        self.assertEqual({relay.send()[:3] for _ in range(3)}, {"250"})
        self.assertLess(memory_mb(relay) - before, 30)
        self.assertEqual(self.kept(relay), 6)

    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "no /proc")
    def test_endless_lines_headers_and_data_take_no_memory(self):
        relay = self.relay(relay="max_message_size = 2M")
        relay.send()
        before, block = memory_mb(relay), b"y" * 65536
        for start, part in cases(self, [
                (b"", block), (b"DATA\r\n", block), (b"DATA\r\n", b"X-Y: z\r\n" * 8192),
                (b"DATA\r\n", b"\0" * 65536), (b"DATA\r\n", b"\r\n" * 32768),
                (b"DATA\r\n", b"\r\n..\r\n..." * 8192), (b"BDAT 2000000 LAST\r\n", block)]):
            sock, = self.opened(relay, 1)
            with contextlib.suppress(OSError):
                sock.sendall((OPENING if start else b"") + start)
                for _ in range(120):
                    sock.sendall(part)
                sock.sendall(b"\r\nQUIT\r\n")
            replies = read_all(sock)    # but for what a reset took away
            if not start:
                self.assertRegex(replies, rb"\A500 5\.5\.2[^\n]*\n221 [^\n]*\n\Z")
            self.assertEqual(replies.count(b"queued"), b"BDAT" in start)
            self.assertLess(memory_mb(relay) - before, 24)
        self.assertEqual((relay.send()[:3], self.kept(relay)), ("250", 6))

    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "no /proc")
    def test_out_of_descriptors_who_is_in_is_served_and_the_loop_rests(self):
        import resource
        relay = self.relay(relay="max_connections_per_client = 0")
        held, pid = self.opened(relay, 5), relay.process.pid
        hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
        highest = max(map(int, os.listdir("/proc/%d/fd" % pid)))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 1, hard))
        late = [connect(relay.port) for _ in range(20)]
        relay.logged("out of file descriptors")
        used = processor_s(relay)
        time.sleep(0.5)                 # the loop must have nothing to do
        self.assertLess(processor_s(relay) - used, 0.2)
        held[0].sendall(b"NOOP\r\n")
        with held[0].makefile("rb") as lines:
            self.assertIn(b"250 2.0.0", lines.readline())
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
        self.assertEqual({read(sock)[:4] for sock in late}, {b"220 "})
        for sock in [*late, *held]:
            sock.close()
        self.assertEqual((relay.send()[:3], self.kept(relay), relay.end()), ("250", 2, 0))

    def test_who_breaks_off_leaves_nothing_behind(self):
        relay = self.relay()
        stages = [b"", b"EH", b"HELO x\r\n", b"z" * 5000] + [OPENING + sent for sent in (
            b"", b"DATA\r\n", b"DATA\r\nhalf a line", b"DATA\r\n" + b"x" * 400000 + b"\r\n.",
            b"BDAT 5\r\nabcdeBDAT 10 LAST\r\nabc")]
        for sent, how in cases(self, itertools.product(stages, ("FIN", "RST"))):
            sock, = self.opened(relay, 1)
            sock.sendall(sent)
            if how == "RST":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        self.assertEqual(self.kept(relay), 0)

    def test_timeouts_shrink_when_connections_run_short(self):
        relay = self.relay(relay="max_connections = 10", STRESS_TIMEOUT_S=0.3, SWEEP_S=0.1)
        calm = self.opened(relay, 7)
        self.assertEqual(select.select(calm, [], [], 1.0)[0], [])
        self.opened(relay, 2)
        idle = wait(lambda: select.select(calm, [], [], 0)[0], "a 421 to the idle")
        self.assertIn(b"421 4.4.2", b"".join(map(read, idle)))

    def test_who_speaks_before_the_banner_is_turned_away(self):
        relay = self.relay(relay="greet_pause = 60s")
        with connect(relay.port) as hasty:      # which is less than the pause
            connect(relay.port).close()
            hasty.sendall(b"EHLO x\r\n")
            self.assertRegex(read_all(hasty), rb"\A521 5\.5\.1 [^\r]*\r\n\Z")
        self.reload(relay, "configuration reread", relay="greet_pause = 1s")
        began = time.monotonic()
        with connect(relay.port) as patient:
            self.assertEqual(patient.recv(4), b"220 ")
            self.assertGreater(time.monotonic() - began, 0.9)
        relay.logged(r"NOQUEUE: reject: PREGREET from unknown\[127\.0\.0\.1\]: 521 5\.5\.1")

    def test_a_queue_that_is_full_takes_no_more_declared_or_not(self):
        relay = self.relay(domain="max_queue_size = 3000\n[domain roomy.example]\n")
        with relay.client() as client:
            for size, options, reply in cases(self, [
                    (2000, {}, "250"), (20, {"parameters": " SIZE=2000"}, "452 4.2.2"), (20, {}, "250"),
                    (2000, {}, "452 4.2.2"), (2000, {"recipients": ["u@roomy.example"]}, "250")]):
                self.assertEqual(client.send(b"x" * size + b"\r\n", **options)[:len(reply)], reply)
                client.say("RSET")
        self.assertEqual(self.kept(relay), 6)

    def test_nothing_from_the_network_forges_a_log_line_a_header_or_a_file_name(self):
        relay = self.relay()
        nasty = ["<script>alert()</script>", '{"a": "b\\u0000"}', "x\u2028y\u2029z", "\u202e", "\U0001f600",
                 "x]: 5F0A21: removed", "x status=sent (250 ok)", "%s%n%x", "../../etc/passwd", "a\\r\\nb",
                 "\x85\x9b31m"]
        for text in cases(self, [*nasty, "x" * 1900]):
            with relay.client("EHLO " + text) as client:
                quoted = '"%s"' % text.replace('"', "")
                client.say("MAIL FROM:<%s@b.example> SMTPUTF8" % text, "RSET", "MAIL FROM:<> SMTPUTF8",
                           "MAIL FROM:<%s@b.example> SMTPUTF8" % quoted, "RCPT TO:<%s@x.example>" % quoted,
                           "RCPT TO:<%s@%s>" % (text, DOMAIN), "RCPT TO:<u@%s>" % DOMAIN, "DATA")
                client.raw(b"Subject: x\r\n\r\nx\r\n.\r\n")
                client.reply()
                client.say("RSET", "ETRN " + text, "VRFY " + text)
        relay.logged(r"smtpd\[\d+\]: NOQUEUE: reject: RCPT from unknown\[127\.0\.0\.1\]: 554 5\.7\.1 <.+@x\."
                     r"example>: Relay access denied; from=<.*> to=<.+@x\.example> proto=ESMTP helo=<")
        rows = relay.queue()
        self.assertGreaterEqual(len(rows), len(nasty))          # one name is over the length of a command
        for row in rows:
            header = relay.run("--show", row["id"], "--raw")[1].partition("\r\n\r\n")[0]
            self.assertRegex(header, r"\AReceived: from [^\r\n<>(){}\"\\]* \(unknown \[127\.0\.0\.1\]\)"
                             r"(\r\n\t[^\r]+){2,3}\r\nSubject: x\Z")
        start = r"\A[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d backup etrn_relay/[a-z]+\[%d\]: " % relay.process.pid
        for line in relay.log:
            self.assertRegex(line, start)
            self.assertTrue(line.isprintable())
        self.no_bugs(relay.log)
        for name in itertools.chain.from_iterable(names for _, _, names in os.walk(relay.spool)):
            self.assertRegex(name, r"\A([0-9A-F]{6,20}\.(eml|json|new)|[a-z]+\.(json|new)|control|lock)\Z")


# -- recipients, sizes, cut-through, while_up

TAKEN, REFUSED, UNSURE = "250 2.1.5", "550 5.1.1", "450 4.1.1"


class Recipients(Relays):
    """Whom a domain has: by list, by file, by its primary's word; and how large mail may be."""

    VERIFY = "recipients = verify\nunknown_recipients = defer\n"

    def test_what_is_remembered_is_bounded_and_the_newest_good_one_is_not_forgotten(self):
        memory = etrn.RecipientCache()
        with shorten(RECIPIENTS_MAX=20):
            for number in range(100):
                name = "d%d.example" % number           # all subdomains of a wildcard
                memory.learn("u@" + name, number % 2 == 0, 1000.0 + number)
                memory.learn_accept_all(name, False, 1000.0)
        self.assertLessEqual(max(map(len, (memory.known, memory.accept_all, memory.rows))), 20)
        self.assertEqual([memory.knows("u@d%d.example" % number, 1100.0) for number in (98, 0)], [True, None])

    def test_a_list_is_obeyed_and_postmaster_is_on_it(self):
        relay = self.relay(domain="recipients = one@ourdom.example, Two@OURDOM.example")
        replies = self.rcpt(relay, "one", "ONE", "two", "three", "PostMaster")
        self.assertEqual(replies, [TAKEN] * 3 + [REFUSED, TAKEN])

    def test_a_file_is_obeyed_and_read_again_but_not_a_failed_export(self):
        path = self.path("list")

        def write(text):
            save(path + ".new", text)
            os.replace(path + ".new", path)
        write("# empty\n")
        relay = self.relay(domain="recipients = file:" + path, SWEEP_S=0.05)
        self.assertEqual(self.rcpt(relay, "one", "two", "postmaster"), [UNSURE, UNSURE, TAKEN])
        for text, said, replies in cases(self, [
                ("\ufeff# ours\r\none@ourdom.example OK\r\nnobody\r\n", "not an address in line 3",
                 [TAKEN, REFUSED]),
                ("", "no address in it: the old list stays", [TAKEN, REFUSED]),
                ("@ourdom.example x\n", ": 1 recipients", [TAKEN, TAKEN]),
                ("two@ourdom.example\n", ": 1 recipients", [REFUSED, TAKEN])]):
            since = len(relay.log)
            write(text)
            relay.logged(said, since)
            self.assertEqual(self.rcpt(relay, "one", "two"), replies)
        os.unlink(path)
        relay.logged("list: not read again: ")
        write("")
        self.reload(relay, "configuration reread")
        self.assertEqual(self.rcpt(relay, "one", "two"), [REFUSED, TAKEN])

    def test_the_primary_is_asked_and_its_word_remembered(self):
        primary = self.primary(RCPT=lambda to: (
            None if to[4:].partition("@")[0] in ("good", "late") else "550 5.1.1 no such user here"))
        for policy, code in cases(self, [("accept", TAKEN), ("defer", UNSURE)]):
            primary.start()
            relay = self.relay(primary, domain="recipients = verify\nunknown_recipients = " + policy)
            self.assertEqual(self.rcpt(relay, "good", "bad", "good"), [TAKEN, REFUSED, TAKEN])
            with relay.client() as client:
                self.assertIn("(550 5.1.1 no such user here)", client.say(*ENVELOPE))
            primary.stop()
            self.rcpt(relay, "other")
            relay.logged(r"ourdom\.example: down: ")
            for is_first in (True, False):
                replies = self.rcpt(relay, "good", "bad", "late", "Postmaster")
                self.assertEqual(replies, [TAKEN, REFUSED, code, TAKEN])
                if is_first and code == UNSURE:
                    relay.end()
                    relay.start()               # what was learned is on disk
            primary.start()
            wait(lambda relay=relay: self.rcpt(relay, "late", "new") == [TAKEN, REFUSED], "its own word")
            primary.stop()

    def test_sessions_share_a_question_wait_some_seconds_at_most_and_a_late_answer_is_kept(self):
        gate = threading.Event()
        primary = self.primary(RCPT=lambda argument: "550 5.1.1 no" if gate.wait(DEADLINE_S) else None)
        relay = self.relay(primary.start(), domain=self.VERIFY + "[domain other.example]\n", CALL_AHEAD_S=0.6)
        clients = [enter(self, relay.client()) for _ in range(5)]
        for client in clients:
            client.raw(b"MAIL FROM:<>\r\nRCPT TO:<user@ourdom.example>\r\nNOOP\r\n")
        self.assertEqual(relay.send(recipients=["u@other.example"])[:3], "250")     # nobody else waits
        for client in clients:
            self.assertEqual([client.reply()[:3] for _ in range(3)], ["250", "450", "250"])
        gate.set()
        wait(lambda: self.rcpt(relay, "user") == [REFUSED], "the answer")
        self.assertEqual(sum("user@ourdom.example" in line for line in primary.log), 1)

    def test_a_primarys_own_size_bounds_mail_for_its_domains_alone(self):
        sizes = {"small": "SIZE 100000", "large": "SIZE 9000000", "odd": "SIZE 10", "silent": "8BITMIME"}
        primaries = {name: self.primary(extensions=[one]).start() for name, one in sizes.items()}
        primaries["silent"].script["EHLO"] = b"250-primary.example\r\n250 SIZE 1\xb2\r\n"      # no number
        domains = "".join("[domain %s.example]\nprimary = %s\n" % (name, one.address)
                          for name, one in primaries.items())
        relay = self.relay(relay="max_message_size = 20M", domain=domains)
        relay.send(recipients=["u@%s.example" % name for name in sizes])
        relay.until_empty()

        def answers(size):
            with relay.client() as client:
                self.assertIn("250-SIZE 20971520", client.say("EHLO x").split("\n"))
                client.say("MAIL FROM:<> SIZE=%d" % size)
                return " ".join(client.say("RCPT TO:<u@%s.example>" % name)[:3] for name in sizes)
        for _ in range(2):
            for size, replies in cases(self, [(98000, "250 250 250 250"), (99900, "552 250 250 250"),
                                              (8999900, "552 552 250 250"), (20000000, "552 552 250 250")]):
                self.assertEqual(answers(size), replies)
            relay.end()
            relay.start()                   # it is remembered
        with relay.client() as client:      # SIZE was not declared: what is too large for all is refused
            for names, reply in cases(self, [(["small"], "552 5.3.4"), (["small", "large"], "250 2.0.0")]):
                people = ["u@%s.example" % name for name in names]
                self.assertEqual(client.send(b"x" * 99950 + b"\r\n", recipients=people)[:9], reply)
        wait(lambda: "exceeds the primary's limit" in str(relay.queue()[0]["recipients"]), "one to stay")
        domains = domains.replace(primaries["small"].address, "127.0.0.1:9")
        self.reload(relay, "configuration reread", domain=domains)
        self.assertEqual(answers(99900), "250 250 250 250")     # another primary has another limit


class CutThrough(Relays):
    """While the primary is up the client hears its verdict, and nothing is kept."""

    OPTIONS = "cutthrough = yes\nrecovery_grace = 0s\n"

    def test_the_client_hears_the_primarys_own_verdict(self):
        table = [
            ({}, "250 2.0.0"), ({".": "554 5.6.0 a"}, "554 5.6.0 a"), ({"RCPT": "550 5.1.1"}, "550 5.1.1"),
            ({"MAIL": "550 5.7.1 not you"}, "550 5.7.1 not you"), ({"DATA": "554 5.5.0 no"}, "554 5.5.0 no"),
            ({".": "550 no word"}, "550 5.0.0 no word"), ({".": "550-5.7.1 a\n550 5.7.1 b"}, "550 5.7.1 a"),
            ({".": "554 5.6.0 caf\xe9\x01"}, r"554 5.6.0 caf\xe9\x01"), ({".": "451 4.3.0 a"}, "250 2.0.0"),
            ({"RCPT": "452 4.2.2 full"}, "250 2.0.0"), ({".": b"gibberish\r\n"}, "250 2.0.0"),
            ({".": CUT}, "250 2.0.0"), ({"DATA": CUT}, "250 2.0.0"), ({"greeting": "554 5.3.2"}, "250 2.0.0")]
        primaries = [self.primary(**said).start() for said, _ in table]
        relay = self.relay(domain="".join("[domain d%d.example]\nprimary = %s\nretry_interval = 1h\n%s" % (
            number, one.address, self.OPTIONS) for number, one in enumerate(primaries)), PROBE_FIRST_S=60.0)
        kept = 0
        for number, (said, reply) in cases(self, enumerate(table)):
            self.assertEqual(relay.send(recipients=["u@d%d.example" % number])[:len(reply)], reply)
            self.assertEqual(len(primaries[number].messages), 0 if said else 1)
            if reply[0] == "5":         # nothing is kept, and that before the client hears of it
                self.assertEqual(len(relay.files()), kept)
            kept += 2 if said and reply[0] == "2" else 0
            wait(lambda kept=kept: len(relay.files()) == kept, "%d files" % kept)
        self.assertEqual([line for line in relay.log if "notification" in line], [])
        domains = relay.json("--status")["domains"]
        self.assertEqual([domains["d%d.example" % number]["accepted"] for number in range(len(table))],
                         [int(reply[0] == "2") for _, reply in table])

    def test_mixed_verdicts_and_mail_to_two_domains_are_250_and_harmless_notices_tell_of_the_refused(self):
        said = b"550-5.1.1 a\r\n550-5.1.1 Bcc: v@x.example\r\n550 5.1.1 \x1b[2J\xff\0\r\n"
        primary = self.primary(RCPT=lambda to: None if "good@" in to else said).start()
        smarthost = self.primary().start()
        two = "[domain two.example]\nprimary = %s\n" % primary.address
        relay = self.relay(primary, domain=self.OPTIONS + two + self.OPTIONS, smarthost=smarthost.address)
        bad = "bad@" + DOMAIN
        for people in cases(self, [["good@" + DOMAIN, bad], [bad, "bad@two.example"]]):
            self.assertEqual(relay.send(recipients=people)[:3], "250")
            relay.until_empty()
            told = b"".join(data for *_, data in smarthost.messages)
            self.assertEqual(set(re.findall(rb"Final-Recipient: rfc822; (\S+)", told)),
                             {one.encode() for one in people if one[:3] == "bad"})
            self.assertEqual({(one[0], *one[1]) for one in smarthost.messages}, {("", "a@sender.example")})
        self.assertEqual(len(primary.messages), 1)
        for _, _, data in smarthost.messages:
            one = parts_of(email.message_from_bytes(data, policy=email.policy.default))[1]
            self.assertEqual((one["Status"], one["Diagnostic-Code"][:17], one["Remote-MTA"]),
                             ("5.1.1", "smtp; 550 5.1.1 a", "dns; 127.0.0.1"))
            self.assertNotRegex(data, rb"(?mi)^bcc:|[\x00\x1b\xff]")
        self.assertTrue(all(line.isprintable() for line in relay.log))

    def test_a_client_that_leaves_while_the_primary_hangs_costs_no_mail(self):
        primary = self.primary(**{".": HANG}).start()
        relay = self.relay(primary, domain=self.OPTIONS)
        with relay.client() as client:
            client.say(*ENVELOPE, "DATA")
            client.raw(b"x\r\n.\r\n")
            wait(lambda: primary.uses["."], "it to hang")
        wait(lambda: len(relay.files()) == 2, "the message to be kept")
        primary.stop()
        primary.script.clear()
        primary.start()
        relay.until_empty()
        self.assertEqual(len(primary.messages), 1)


class WhileUp(Relays):
    """while_up = defer: spam that avoids the primary is put off, who persists is not."""

    def test_mail_stays_out_while_the_primary_is_up_but_for_who_persists(self):
        relay = self.relay(self.primary().start(), domain="while_up = defer", GREYLIST_WAIT_S=0.5)
        later, taken = ["450 4.3.2"], [TAKEN]
        self.assertEqual(self.rcpt(relay, "u", "u", "v", "postmaster", "PostMaster"), later * 3 + taken * 2)
        time.sleep(0.6)                 # the five minutes
        self.assertEqual(self.rcpt(relay, "u", "u", "v", "v"), taken * 2 + later + taken)
        self.assertEqual(self.rcpt(relay, "u", sender="c@b.example"), later)

    def test_mail_is_taken_as_soon_as_the_primary_is_not_known_to_be_up(self):
        primary = self.primary()
        relay = self.relay(primary, domain="while_up = defer",
                           KNOWN_UP_S=0.3, IDLE_CONNECTION_S=0.1, SWEEP_S=0.05, CALL_AHEAD_S=0.3)
        self.assertEqual(self.rcpt(relay, "u"), [TAKEN])
        primary.start()
        since = len(relay.log)
        relay.signal(signal.SIGUSR1)    # no mail waits, and it is asked all the same
        relay.logged(r"ourdom\.example: up", since)
        wait(lambda: self.rcpt(relay, "u") == ["450 4.3.2"], "the relay to see that the primary is up")
        primary.script["greeting"] = HANG
        wait(lambda: self.rcpt(relay, "u", sender="new@b.example") == [TAKEN], "mail to be taken")

    def test_persistence_is_three_tries_and_five_minutes_of_the_same_three(self):
        networks = ["192.0.2.1", "192.0.2.9", "192.0.3.1", "2001:db8::1", "2001:db8::2", "2001:db8:0:1::1"]
        for clients, seconds, expected in cases(self, [
                ([0, 0, 0, 1], [0, 299, 299.9, 300], [0, 0, 0, 1]), ([0, 1, 0], [0, 400, 401], [0, 0, 1]),
                ([0] * 5, [0, 1, 90000, 90001, 90301], [0, 0, 0, 0, 1]),
                ([0, 0, 2, 1], [0, 1, 500, 500], [0, 0, 0, 1]),
                ([3, 4, 5, 4], [0, 1, 500, 500], [0, 0, 0, 1])]):
            greylist = etrn.Greylist()
            for client, second, is_taken in zip(clients, seconds, expected):
                self.assertEqual(greylist.is_taken(networks[client], "A@b.example", "U@x.example",
                                                   etrn.Now(second, 0.0)), is_taken)


@unittest.skipIf(os.geteuid(), "only root can start a Postfix of its own")
@unittest.skipUnless(os.path.exists("/usr/share/postfix/master.cf.dist"), "needs Debian's postfix")
class RealPostfix(Secured):
    """Postfix as the primary, and as a client."""

    CONFIG = """
        compatibility_level=3.6 queue_directory=%(folder)s/spool data_directory=%(folder)s/data alias_maps=
        maillog_file=%(folder)s/log maillog_file_prefixes=%(folder)s notify_classes= mydestination=
        myhostname=primary.example inet_interfaces=127.0.0.1 inet_protocols=ipv4 mynetworks=127.0.0.0/8
        virtual_mailbox_domains=ourdom.example virtual_mailbox_maps=inline:{user@ourdom.example=box/}
        virtual_mailbox_base=%(folder)s/mail virtual_uid_maps=static:%(uid)d virtual_gid_maps=static:%(gid)d
        smtpd_peername_lookup=no smtp_tls_security_level=encrypt smtpd_tls_security_level=may
        smtpd_tls_cert_file=%(pems)s/one.pem smtpd_tls_key_file=%(pems)s/one.key smtpd_tls_loglevel=1 """

    def relay_to_postfix(self, domain):
        self.port = unused_port()
        return self.relay("127.0.0.1:%d" % self.port, domain=domain)

    def start_postfix(self, options=""):
        """One of the test's own: its folder, self.port, a mailbox for user@ourdom.example."""
        folder = self.postfix = tempfile.mkdtemp(prefix="etrn-postfix-")
        self.addCleanup(shutil.rmtree, folder, True)
        os.chmod(folder, 0o755)
        for name in ("etc", "spool", "data", "mail/box/new", "mail/box/cur", "mail/box/tmp"):
            os.makedirs(os.path.join(folder, name))
        master = load("/usr/share/postfix/master.cf.dist")
        master = re.sub(r"(?m)^smtp(\s+inet\s)", r"%d\1" % self.port, master)
        no_chroot = re.sub(r"(?m)^(\S+\s+(?:unix|inet|fifo)\s+\S+\s+\S+\s+)y", r"\1n", master)
        nobody = pwd.getpwnam("nobody")
        values = {"folder": folder, "pems": self.folder, "uid": nobody.pw_uid, "gid": nobody.pw_gid}
        config = "".join(word + "\n" for word in (self.CONFIG % values + options).split())
        for name, text in (("log", ""), ("etc/main.cf", config), ("etc/master.cf", no_chroot)):
            save(os.path.join(folder, name), text)
        for where, _, _ in os.walk(os.path.join(folder, "mail")):
            shutil.chown(where, "nobody")
        for name in ("data", "log"):    # postsuper, which tells of half-made files, is not root
            shutil.chown(os.path.join(folder, name), "postfix")
        self.box = mailbox.Maildir(os.path.join(folder, "mail", "box"), create=False)
        self.addCleanup(self.run_postfix, "stop", folder)
        self.run_postfix("start", folder)

    def run_postfix(self, word, folder):
        done = subprocess.run(["postfix", "-c", os.path.join(folder, "etc"), word], timeout=60,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if word == "start" and done.returncode:
            self.fail(self.read_log()[-3000:])

    def read_log(self):
        return load(os.path.join(self.postfix, "log"))

    def test_mail_goes_over_starttls_to_a_postfix_and_from_a_postfix(self):
        relay = self.relay_to_postfix("\n".join([
            "tls = sha256:" + self.PIN, "recipients = verify", "cutthrough = yes", "[domain far.example]",
            "primary = 127.0.0.1:9", self.tls_section()]))
        self.start_postfix("transport_maps=inline:{far.example=smtp:[127.0.0.1]:%d}" % relay.port)
        # To the primary: asked for the recipient, then given the message while the client waits.
        self.assertEqual(relay.send(recipients=["nobody@" + DOMAIN])[:9], "550 5.1.1")
        self.assertEqual(relay.send()[:3], "250")
        wait(lambda: len(self.box), "the message at Postfix")
        self.assertRegex(self.read_log(), r"Anonymous TLS connection established from .*127\.0\.0\.1.*TLSv1")
        relay.logged(r"to=<user@ourdom\.example>, relay=127\.0\.0\.1\[127\.0\.0\.1\]:%d, .*dsn=2\.0\.0, "
                     r"status=sent \(250 2\.0\.0 Ok" % self.port)
        relay.until_empty()
        # From Postfix, as a sender.
        with Wire(self.port) as client:
            client.say("EHLO client.example")
            self.assertEqual(client.send(MESSAGE, recipients=["u@far.example", "v@far.example"])[:3], "250")
        row, = wait(relay.queue, "it in our queue")
        self.assertRegex(row["client"]["tls"], r"\ATLSv1\.[23]\Z")
        self.assertEqual([one["address"] for one in row["recipients"]], ["u@far.example", "v@far.example"])
        self.assertRegex(relay.run("--show", row["id"], "--raw")[1],
                         r"\AReceived: from primary\.example \(unknown \[127\.0\.0\.1\]\)\r\n"
                         r"\t\(using TLSv1\.[23] with cipher [A-Z0-9_-]+\)\r\n"
                         r"\tby backup\.example\.net \(etrn_relay\) with ESMTPS id ")

    def test_a_postfix_stopped_and_started_under_load_gets_each_message_once(self):
        relay = self.relay_to_postfix("connections = 2")

        def load(numbers):
            with relay.client() as wire:
                for number in numbers:
                    reply = wire.send(b"Subject: %d\r\n\r\n%s" % (number, b"line of a message\r\n" * 50))
                    self.assertEqual(reply[:3], "250")
        load(range(40))
        relay.logged(": down: ")
        self.start_postfix()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            loading = pool.submit(load, range(40, 120))
            wait(lambda: len(self.box) >= 40, "what waited", 10)
            since = len(relay.log)
            self.run_postfix("stop", self.postfix)
            load(range(120, 160))
            relay.logged(": down: ", since)
            self.run_postfix("start", self.postfix)
            loading.result(DEADLINE_S)
        relay.until_empty()
        wait(lambda: {one["Subject"] for one in self.box} == set(map(str, range(160))), "all", 2 * DEADLINE_S)
        # "postfix stop" cuts two connections; what it took of a window without having said so comes again.
        self.assertLessEqual(len(self.box) - 160, 2 * etrn.CHUNK_MESSAGES)

    def test_postfix_is_told_the_original_client(self):
        for verb in cases(self, ["xclient", "xforward"]):
            relay = self.relay_to_postfix("xclient = yes")
            self.start_postfix("smtpd_authorized_%s_hosts=127.0.0.1" % verb)
            for _ in range(2):
                with Wire(relay.port, "127.0.0.9") as wire:
                    wire.say("EHLO odd+name=x.example")
                    self.assertEqual(wire.send(b"Subject: 1\r\n\r\nx\r\n")[:3], "250")
            wait(lambda: len(self.box) == 2, "both")
            shown = {" ".join(message["Received"].split()[:4]) for message in self.box}
            if verb == "xclient":
                self.assertEqual(shown, {"from odd+name=x.example (unknown [127.0.0.9])"})
            else:                       # [TEMPUNAVAIL] would be a syntax error there, and all of it ignored
                wait(lambda: self.read_log().count("orig_client=unknown[127.0.0.9]") == 2, "both in its log")
            self.assertEqual([line for line in relay.log if "refuses X" in line], [])


# -- other mail servers, as the primary and as clients

# Of its package a file; its configuration; what starts it; of the twenty messages what it refuses and how;
# longer lines it breaks or refuses; what is logged when it has enough of a connection.
MailServer = collections.namedtuple("MailServer", "file files command left line_octets limit",
                                    defaults=({12: "550"}, 3000, ""))


def lines(text):
    """So that a configuration takes less room here."""
    return re.sub(r";\s+", "\n", text)


KEEP = """#!/bin/sh
file=$(mktemp %(place)s/tmp/XXXXXXXXXX) && cat > "$file" && mv "$file" %(place)s/box
"""
EXIM = lines("""primary_hostname = primary.example; local_interfaces = 127.0.0.1;
    daemon_smtp_ports = %(port)d; exim_path = %(root)s/usr/sbin/exim4;
    log_file_path = %(place)s/tmp/exim-%%s; pid_file_path = %(place)s/tmp/exim-pid;
    rfc1413_query_timeout = 0s; smtputf8_advertise_hosts = *; tls_advertise_hosts = *;
    tls_certificate = %(pems)s/one.pem; tls_privatekey = %(place)s/exim.key; smtp_accept_max = 0;
    smtp_accept_queue_per_connection = 0; smtp_accept_max_per_connection = 20; recipients_max = 3;
    acl_smtp_rcpt = rcpt; begin acl; rcpt:; drop local_parts = unknown; accept;
    begin routers; far:; driver = manualroute; domains = far.example; route_list = * 127.0.0.1::%(next)d;
    self = send; transport = far; box:; driver = accept; transport = box;
    begin transports; far:; driver = smtp; box:; driver = pipe; command = %(place)s/keep; user = nobody;
    message_prefix =; message_suffix =; begin retry; * * F,1d,1s; """)
OPENSMTPD = lines("""pki primary cert "%(pems)s/one.pem"; pki primary key "%(pems)s/one.key";
    table people { "user@ourdom.example" = nobody, "v@ourdom.example" = nobody };
    listen on 127.0.0.1 port %(port)d tls pki primary hostname primary.example;
    action box mda "%(place)s/keep" virtual <people>; match from any for domain ourdom.example action box;
    action far relay host smtp://127.0.0.1:%(next)d; match from any for domain far.example action far; """)
SENDMAIL = lines("""include(`%(root)s/usr/share/sendmail/cf/m4/cf.m4'); OSTYPE(`linux');
    undefine(`ALIAS_FILE'); define(`confPID_FILE', `%(place)s/tmp/sendmail-pid');
    define(`STATUS_FILE', `%(place)s/tmp/statistics'); define(`QUEUE_DIR', `%(place)s/queue');
    define(`confDOMAIN_NAME', `primary.example');
    define(`confTO_IDENT', `0'); define(`confQUEUE_LA', `1000'); define(`confREFUSE_LA', `1000');
    define(`confMAX_RCPTS_PER_MESSAGE', `3'); define(`confCACERT', `/var/lib/one.pem');
    define(`confCACERT_PATH', `/var/lib'); define(`confSERVER_CERT', `/var/lib/one.pem');
    define(`confSERVER_KEY', `/var/lib/one.key'); define(`ESMTP_MAILER_ARGS', `TCP $h %(next)d');
    FEATURE(`no_default_msa'); FEATURE(`nocanonify'); FEATURE(`accept_unresolvable_domains');
    FEATURE(`promiscuous_relay'); DAEMON_OPTIONS(`Name=MTA, Family=inet, Addr=127.0.0.1, Port=%(port)d');
    MAILER(smtp); LOCAL_RULE_0; R unknown < @ $+ > $*\t$#error $@ 5.1.1 $: "550 no such user";
    R$* < @ far.example . > $*\t$#esmtp $@ [127.0.0.1] $: $1 < @ far.example . > $2;
    R$* < @ ourdom.example . > $*\t$#box $@ here $: $1; MAILER_DEFINITIONS;
    Mbox, P=%(place)s/keep, F=lsDFMn8, L=0, T=DNS/RFC822/X-Unix, A=keep $u; """)
CHASQUID = lines("""hostname: "primary.example"; smtp_address: "127.0.0.1:%(port)d";
    data_dir: "%(place)s/queue"; mail_log_path: "<stdout>"; """)
AIOSMTPD = """
import subprocess, sys
sys.path.insert(0, "%(root)s/usr/lib/python3/dist-packages")
from aiosmtpd.controller import Controller
class Handler:
    async def handle_RCPT(self, server, session, envelope, address, options):
        if "unknown" in address:
            return "550 5.1.1 no such user"
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 ok"
    async def handle_DATA(self, server, session, envelope):
        for _ in envelope.rcpt_tos:
            subprocess.run("./keep", input=envelope.content, check=True)
        return "250 2.0.0 ok"
controller = Controller(Handler(), "127.0.0.1", %(port)d, enable_SMTPUTF8=True)
controller.start()
controller._thread.join()
"""
HARAKA = """
const {execFileSync} = require("child_process")
exports.hook_rcpt = (next, connection, [{user}]) => next(user === "unknown" ? DENY : OK, "no such user")
exports.hook_queue = (next, {transaction: {message_stream, rcpt_to}}) => message_stream.get_data((input) => {
    for (const _ of rcpt_to) execFileSync("%(place)s/keep", {input})
    next(OK)
})
"""
SMTP_SERVER = """
const {SMTPServer} = require("%(root)s/usr/lib/node_modules/smtp-server")
const {execFileSync} = require("child_process")
new SMTPServer({
    authOptional: true, disableReverseLookup: true,
    onRcptTo: ({address}, session, done) => done(/unknown/.test(address) ? new Error("no such user") : null),
    onData: (stream, {envelope}, done) => {
        const parts = []
        stream.on("data", (part) => parts.push(part)).on("end", () => {
            for (const _ of envelope.rcptTo) execFileSync("./keep", {input: Buffer.concat(parts)})
            done()
        })
    },
}).listen(%(port)d, "127.0.0.1")
"""
NO_UTF8 = "the primary does not offer SMTPUTF8"
SERVERS = {
    "exim": MailServer(
        "usr/sbin/exim4", {"var/lib/exim4/config.autogenerated": EXIM, "exim.key": PEMS["one.key"]},
        "$root/usr/sbin/exim4 -bdf -q5s", limit="421 too many messages"),
    "opensmtpd": MailServer("usr/sbin/smtpd", {"smtpd.conf": OPENSMTPD},
                        "mount --bind $root/usr/libexec /usr/libexec; $root/usr/sbin/smtpd -d -f smtpd.conf",
                        {4: NO_UTF8, 12: "524 5.2.4"}, limit="Too many messages sent"),
    "sendmail": MailServer(         # a copy has no set-group-ID bit, and looks for libraries where it is told
        "usr/libexec/sendmail/sendmail", {"sendmail.mc": SENDMAIL, "var/lib/one.pem": PEMS["one.pem"],
                                              "var/lib/one.key": PEMS["one.key"]},
        "$m4 -D_CF_DIR_=$root/usr/share/sendmail/cf/ sendmail.mc > sendmail.cf\n"
        "chmod 600 var/lib/one.key; cp $root/usr/libexec/sendmail/sendmail .\n"
        "$PWD/sendmail -C$PWD/sendmail.cf -bD -q5s",
        {4: NO_UTF8, 12: "550 5.1.1"}),
    "chasquid": MailServer(
        "usr/bin/chasquid", {
            "chasquid.conf": CHASQUID, "certs/primary.example/fullchain.pem": PEMS["one.pem"],
            "certs/primary.example/privkey.pem": PEMS["one.key"], "domains/ourdom.example/aliases":
                "user: | %(place)s/keep\nv: | %(place)s/keep\nfar: u@far.example\n"},
        "$root/usr/bin/chasquid -config_dir=$PWD -testing__outgoing_smtp_port=%(next)d",
        {3: "554 5.6.0 Error parsing message: EOF", 12: "550 5.1.1"}),
    "aiosmtpd": MailServer("usr/lib/python3/dist-packages/aiosmtpd/smtp.py", {"server.py": AIOSMTPD},
                       "$python server.py", line_octets=980),
    "haraka": MailServer(
        "usr/lib/node_modules/Haraka/bin/haraka", {
            "plugins/box.js": HARAKA, "config/plugins": "box\ntls\n", "config/me": "primary.example\n",
            "config/smtp.ini": "listen=127.0.0.1:%(port)d\nnodes=0\n",
            "config/tls_cert.pem": PEMS["one.pem"], "config/tls_key.pem": PEMS["one.key"]},
        "cp -n $root/usr/lib/node_modules/Haraka/config/*.ini config || true\n"
        "$node $root/usr/lib/node_modules/Haraka/bin/haraka -c .", line_octets=980),
    "smtp-server": MailServer("usr/lib/node_modules/smtp-server/package.json", {"server.js": SMTP_SERVER},
                          "$node server.js"),
}


class RealServers(Secured):
    """In folders of their own in $ETRN_TEST_MTAS (.ci/run does so), or where Debian, pip and npm put them."""
    ACCOUNTS = "root", "nobody", "Debian-exim", "opensmtpd", "opensmtpq", "smmta", "smmsp", "mail"

    def relay_to(self, name, domain):
        """With its mail server still down; that is in self.place, with what it keeps in box/."""
        self.server = SERVERS[name]
        places = os.path.join(os.environ.get("ETRN_TEST_MTAS", "/nowhere"), name), "/"
        root = next((one for one in places if os.path.exists(os.path.join(one, self.server.file))), None)
        if root is None:
            self.skipTest("no %s here" % name)
        self.apart = [program("unshare"), "-mp", "--mount-proc", "--fork", "--kill-child"]
        if os.geteuid() or subprocess.call([*self.apart, "true"], stderr=subprocess.DEVNULL):
            self.skipTest("needs root and namespaces")
        self.place, self.port = os.path.join(self.folder, "place"), unused_port()
        relay = self.relay("127.0.0.1:%d" % self.port, domain="\n".join([
            domain, "[domain far.example]", "primary = 127.0.0.1:9", self.tls_section()]))
        address = "127.%d.%d.%d" % tuple(random.sample(range(2, 250), 3))
        enter(self, Dns({}, address=address, port=53))      # it knows nobody
        files = {"keep": KEEP, "etc/resolv.conf": "nameserver %s\n" % address,
                 "etc/hosts": "127.0.0.1 localhost primary.example far.example\n",
                 "etc/passwd": "".join("%s:x:%d:%d::/:/bin/sh\n" % (one, id, id)
                                       for id, one in enumerate(self.ACCOUNTS)),
                 "etc/group": "".join("%s:x:%d:\n" % (one, id) for id, one in enumerate(self.ACCOUNTS))}
        values = {"place": self.place, "root": root, "port": self.port, "next": relay.port,
                  "pems": self.folder}
        for path, text in {**files, **self.server.files}.items():
            os.makedirs(os.path.dirname(os.path.join(self.place, path)), exist_ok=True)
            save(os.path.join(self.place, path), text % values)
        for path in ("run", "queue/domaininfo", "var/lib/opensmtpd/empty", "var/spool/exim4", "box", "tmp"):
            os.makedirs(os.path.join(self.place, path))
        for path, mode in (("", 0o755), ("one.key", 0o600), ("place/keep", 0o755), ("place/box", 0o777),
                           ("place/tmp", 0o777), ("place/var/spool/exim4", 0o777)):
            os.chmod(self.path(path), mode)
        library = "%s/usr/lib/%s-linux-gnu" % (root, platform.machine())
        self.environment = dict(os.environ, root=root, python=sys.executable, node=shutil.which("node") or "",
                                m4=shutil.which("m4") or root + "/usr/bin/m4", LD_LIBRARY_PATH=library)
        mounts = ["etc/passwd", "etc/group", "etc/hosts", "etc/resolv.conf", "var/lib", "var/spool", "run"]
        self.command = "set -e; ulimit -n 1024\n%s\n%s & wait" % (
            "\n".join("mount --bind %s /%s" % (one, one) for one in mounts), self.server.command % values)
        return relay

    def boot(self):
        """Accounts and fixed paths are the test's own, and a kill takes all its processes."""
        with open(os.path.join(self.place, "log"), "ab") as log:
            process = subprocess.Popen(
                [*self.apart, "sh", "-c", self.command], cwd=self.place, env=self.environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.addCleanup(wait, self.is_dead)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def is_dead(self):
        """The last of its processes, too: its port is free."""
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) != 0

    def box(self):
        """What has arrived, a copy for each recipient."""
        files = pathlib.Path(self.place, "box").iterdir()
        return [re.sub(rb"\r?\n", b"\r\n", file.read_bytes()) for file in files]

    def arrived(self, sent, copies):
        """How often each; what is none of them, whole, below fields that were added, counts as itself.  An
        empty line may follow a header that has no body."""
        known = {re.findall(rb"(?m)^Subject: .*", data)[0]: data for data in sent}
        found = collections.Counter()
        for one in copies:
            likely = known.get((re.findall(rb"(?m)^Subject: .*", one) or [b""])[0], b"never")
            found[likely if one.endswith((likely, likely + b"\r\n")) else one] += 1
        return found

    def mixed(self):
        """Twenty messages and their envelopes."""
        octets, eight_bit = self.server.line_octets, {"parameters": " BODY=8BITMIME"}
        rows = [
            (b"\r\nplain\r\n", {}), (b"\r\n\xff\xfe caf\xe9 \x80\r\n", eight_bit), (b"\r\n", {}), (b"", {}),
            (b"X-Name: gr\xc3\xbc\xc3\x9fe\r\n\r\n\xc3\xbc\r\n", {"parameters": " SMTPUTF8 BODY=8BITMIME"}),
            (b"\r\n.\r\n..\r\n.x\r\n...\r\n\r\n.\r\n", {}), (b"\r\n" + b"0123456789abcde\r\n" * 18000, {}),
            (b"\r\nno newline\r\n", {"is_chunk": True}), (b"\r\n" + b"l" * octets + b"\r\nend\r\n", {}),
            (b"\r\n." + b"d" * (octets - 1) + b"\r\n.\r\n", {}), (b"\r\nnotice\r\n", {"sender": ""}),
            (b"\r\nten\r\n", {"recipients": ["user+%d@%s" % (number, DOMAIN) for number in range(10)]}),
            (b"\r\nnobody\r\n", {"recipients": ["unknown@" + DOMAIN]}),
            (b"\r\nFrom here\r\n\r\nFrom there\r\n>From\r\n", {}), (b"\r\n\r\n\r\n\r\n\r\n", {}),
            (b"\r\nblanks  \r\n\t\r\n   \r\n", {"recipients": ["user@" + DOMAIN, "v@" + DOMAIN]}),
            (b"X-Folded: a\r\n\tb\r\n   c\r\n\r\nfolded\r\n", {}), (b"\r\n" + b".\r\n" * 3000, {}),
            (b"\r\nQUIT\r\nRSET\r\nBDAT 5 LAST\r\n", {}),
            (b'Content-Type: multipart/mixed; boundary="b"\r\n\r\n--b\r\n\r\n1\r\n--b--\r\n', eight_bit)]
        return [(message(number, text), envelope) for number, (text, envelope) in enumerate(rows)]

    def give(self, client, data, is_chunk=False, **envelope):
        if is_chunk:                    # without its last newline, which it gets
            client.say("MAIL FROM:<a@sender.example>", "RCPT TO:<user@%s>" % DOMAIN)
            client.raw(b"BDAT %d LAST\r\n%s" % (len(data) - 2, data[:-2]))
        self.assertEqual((client.reply() if is_chunk else client.send(data, **envelope))[:3], "250")

    def outage(self, name):
        """It takes twenty mixed messages, 24 more whose clients wait, and then sends the twenty itself."""
        relay, sent = self.relay_to(name, "tls = may\ncutthrough = yes"), self.mixed()
        with relay.client() as client:
            for data, envelope in sent:
                self.give(client, data, **envelope)
        relay.logged(r"ourdom\.example: down: ")
        self.boot()
        left = self.server.left
        expected = {data: len(envelope.get("recipients", "1")) for number, (data, envelope) in enumerate(sent)
                    if number not in left}
        wait(lambda: self.arrived(expected, self.box()) == expected, "all of it, once, whole")
        wait(lambda: len(relay.queue()) == len(left), "the rest to be refused")
        for row, (_, text) in zip(relay.queue(), sorted(left.items())):
            self.assertEqual(row["recipients"][0]["last_response"][:len(text)], text)
        for one in self.box() if name != "opensmtpd" else ():       # Debian's fails at every handshake,
            top = one[:one.index(b"by backup.example.net")]         # and then gets its mail in the clear
            self.assertTrue(b"by primary.example" not in top or re.search(rb"(?i)esmtps", top), top)
        more = [message(number) for number in range(100, 124)]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            self.assertEqual({reply[:3] for reply in pool.map(relay.send, more)}, {"250"})
        expected.update(dict.fromkeys(more, 1))
        wait(lambda: self.arrived(expected, self.box()) == expected, "those, too")
        self.assertEqual([line for line in relay.log if "notification" in line], [])
        if "far.example" not in "".join(self.server.files.values()):
            return
        refused, to = {*left, 8, 9} - {12}, ["far@" + DOMAIN] if name == "chasquid" else ["u@far.example"]
        gone = {data: 1 for number, (data, _) in enumerate(sent) if number not in refused}
        with Wire(self.port) as client:
            client.say("EHLO client.example")
            for data, envelope in sent:
                if data in gone:
                    self.give(client, data, **dict(envelope, is_chunk=False, recipients=to))

        wait(lambda: len(relay.json("--queue", "far.example")) == len(gone), "all of it in the queue")
        tls = {row["client"]["tls"] for row in relay.json("--queue", "far.example")}
        self.assertEqual(tls, {"TLSv1.3"})
        waiting = [one for one in self.kept_in(relay) if b"for <u@far.example>" in one]
        self.assertEqual(self.arrived(gone, waiting), gone)

    @long_run
    def test_an_exim_that_hangs_up_behind_each_refusal_gets_the_rest_and_is_asked(self):
        relay = self.relay_to("exim", "recovery_grace = 0s")
        sent = [message(number) for number in range(36)]
        with relay.client() as client:
            for number, data in enumerate(sent):
                self.give(client, data, recipients=[("user@" if number % 3 else "unknown@") + DOMAIN])
        self.boot()
        good = {data: 1 for number, data in enumerate(sent) if number % 3}
        wait(lambda: self.arrived(good, self.box()) == good, "the good ones")
        wait(lambda: not relay.json("--status")["domains"][DOMAIN]["queued"], "the bad ones to be returned")
        self.assertEqual([line for line in relay.log if "status=deferred (lost" in line], [])
        self.reload(relay, "reread", domain="recipients = verify\ncutthrough = yes")
        since = len(relay.log)
        self.assertEqual(self.rcpt(relay, "unknown", "user"), ["550 5.1.1", TAKEN])
        self.assertEqual([line for line in relay.log[since:] if "example: down" in line], [])

    def test_msmtp_sends_over_starttls(self):
        relay = self.relay(domain=self.tls_section())
        command = [program("msmtp"), "--file=/dev/null", "--host=127.0.0.1", "--port=%d" % relay.port,
                   "--tls", "--tls-certcheck=off", "--from=a@sender.example", "u@" + DOMAIN]
        bodies = b"\r\nx\r\n", b"\r\n.\r\n..\r\n\xff\r\n", b"\r\n" + b"l" * 3000 + b"\r\n"
        sent = [message(number, text) for number, text in enumerate(bodies)]
        for data in sent:
            subprocess.run(command, input=data.replace(b"\r\n", b"\n"), check=True, timeout=DEADLINE_S)
        self.assertEqual([row["client"]["tls"] for row in relay.queue()], ["TLSv1.3"] * 3)
        self.assertEqual(self.arrived(sent, self.kept_in(relay)), dict.fromkeys(sent, 1))

    def kept_in(self, relay):
        return [pathlib.Path(relay.at(name)).read_bytes() for name in relay.files() if name.endswith(".eml")]

    def kills(self, name):
        """Killed twice while it is given three hundred messages over one connection."""
        relay, sent = self.relay_to(name, "connections = 1"), [message(number) for number in range(300)]
        with relay.client() as client:
            for data in sent:
                self.give(client, data)
        process = self.boot()
        for goal in (50, 120):
            wait(lambda goal=goal: len(os.listdir(os.path.join(self.place, "box"))) >= goal, "%d" % goal)
            process.kill()
            process.wait()
            wait(self.is_dead)
            process = self.boot()
        wait(relay.is_empty, "an empty spool", 60)
        # Its own work is killed, too: some deliver again what they had, sendmail without the body.
        def found():
            copies = [one for one in self.box() if b"<<< No Message Collected >>>" not in one]
            is_told = b"by primary.example" in copies[0]
            return self.arrived(sent, set(copies) if is_told else copies)
        wait(lambda: found().keys() == set(sent), "all of it, whole")
        window = etrn.CHUNK_MESSAGES if name == "exim" else 1       # that may be in doubt at each kill
        self.assertLessEqual(sum(found().values()), len(sent) + 2 * window)
        self.assertEqual(relay.json("--status")["domains"][DOMAIN]["bounced"], 0)
        self.assertIn(self.server.limit, "\n".join(relay.log) + load(os.path.join(self.place, "log")))


def message(number, text=b"\r\nx\r\n"):
    head = "From: a@sender.example\r\nTo: user@%s\r\nDate: Tue, 1 Dec 2026 10:00:00 +0000\r\n" % DOMAIN
    return ("%sMessage-ID: <%d@sender.example>\r\nSubject: %d\r\n" % (head, number, number)).encode() + text


for server_name, method in itertools.product(SERVERS, (RealServers.outage, RealServers.kills)):
    def test(self, name=server_name, method=method):
        method(self, name)
    setattr(RealServers, "test_%s_%s" % (method.__name__, server_name.replace("-", "_")), long_run(test))


# -- on-demand relay, and ETRN by clients that authenticate

LOGIN_OPTIONS = "username = gw\npassword = se cret"
ODMR = "odmr_listen = 127.0.0.1:0"


def log_in(wire, username="gw", password="se cret", mechanism="CRAM-MD5"):
    """EHLO and AUTH; returns the reply."""
    def encode(text):
        return base64.b64encode(text.encode()).decode()
    wire.say("EHLO gw.example")
    if mechanism == "PLAIN":
        return wire.say("AUTH PLAIN " + encode("\0%s\0%s" % (username, password)))
    challenge = base64.b64decode(wire.say("AUTH CRAM-MD5")[4:])
    return wire.say(encode("%s %s" % (username, hmac.new(password.encode(), challenge, "md5").hexdigest())))


class Authenticated(Relays):
    """Who may ask with ETRN, what is said, RFC 1985; clients that authenticate, and primary = etrn."""

    def ask(self, client, table):
        """ETRN for each name has its reply, of one line."""
        for name, reply in table:
            if reply[:3] == "253":          # the flush before may be under way
                wait(lambda name=name, reply=reply: client.say("etrn\t" + name) == reply, reply)
            else:
                self.assertEqual(client.say("etrn\t" + name)[:len(reply)], reply)
            if reply[:3] == "503":
                client.say("HELO gw")
        self.assertEqual(client.say("NOOP"), "250 2.0.0 Ok")

    def test_each_reply_of_the_table_and_auth_adds_rights_and_takes_none(self):
        down, counted = self.primary(), "253 2.0.0 OK, 1 pending messages for node %s started"
        elsewhere = "primary = 127.0.0.2:%d" % down.port
        domains = [
            "[domain far.example]", elsewhere, "[domain sub.tree.example]", "[domain near.example]",
            "etrn = 127.0.0.1/32", "[domain own.example]", elsewhere, "etrn = 192.0.2.0/24", LOGIN_OPTIONS,
            "[domain sub.own.example]", LOGIN_OPTIONS, "[domain shut.example]", "etrn = none", LOGIN_OPTIONS,
            "[domain strict.example]", "etrn = 192.0.2.0/24", "username = another", "password = x",
            "[domain deep.strict.example]", LOGIN_OPTIONS]
        relay = self.relay(down, relay="trusted_clients = 127.0.0.7/32", domain="\n".join(domains))
        for name in (DOMAIN, "far.example", "own.example"):
            relay.send(recipients=["u@" + name])
            relay.logged(re.escape(name) + ": down: ")
        stranger = [("near.example", "459 4.7.1"), (DOMAIN, "250 2.0.0"), ("far.example", "250 2.0.0"), *(
            (name, "459 4.7.1") for name in ("strict.example", "@strict.example", "elsewhere.example",
                                             "shut.example", "@example"))]
        for source, table in cases(self, [
                ("127.0.0.8", [("x", "503 5.5.1"), *stranger, ("own.example", "459 4.7.1")]),
                ("127.0.0.1", [
                    (DOMAIN, "503 5.5.1"), ("", "500 5.5.4"), ("#q", "501 5.5.4"), ("../x", "501 5.5.4"),
                    ("example", "459 4.7.1"), ("other.example", "459 4.7.1"), ("@other.example", "459 4.7.1"),
                    ("shut.example", "459 4.7.1"), ("tree.example", "459 4.7.1"), ("@tree.example", "250 2"),
                    ("near.example", "250 2"), ("far.example", "250 2.0.0"),
                    ("OurDom.Example.", counted % DOMAIN)]),
                ("127.0.0.7", [
                    ("x", "503 5.5.1"), ("near.example", "459 4.7.1"), (DOMAIN, counted % DOMAIN)])]):
            with Wire(relay.port, source) as client:
                self.ask(client, table)
        with Wire(relay.port, "127.0.0.8") as client:
            self.assertEqual(log_in(client), "235 2.7.0 Authentication successful")
            self.ask(client, [*stranger, ("own.example", counted % "own.example"), ("@own.example", "25")])
            self.assertEqual(client.say("MAIL FROM:<>", "RCPT TO:<u@elsewhere.example>")[:9], "554 5.7.1")
        relay.logged(r"smtpd\[\d+\]: unknown\[127\.0\.0\.8\]: sasl_method=CRAM-MD5, sasl_username=gw$")
        relay.run("--hold", DOMAIN)
        with relay.client() as client:
            self.assertEqual(client.say("ETRN " + DOMAIN)[:9], "458 4.0.0")
            self.assertEqual(client.say("MAIL FROM:<>", "ETRN " + DOMAIN)[:9], "503 5.5.1")
        relay.logged(r"flush\[\d+\]: etrn: site=ourdom\.example, client=unknown\[127\.0\.0\.1\], messages=1, "
                     r"reply=253")

    def test_passwords_are_read_from_files_and_again_at_sighup(self):
        secret = self.path("secret")
        options = "username = gw\npassword = file:" + secret
        relay = Relay(self.folder, "etrn", domain=options, LOGIN_FAILED_S=0.01)
        self.addCleanup(relay.__exit__)
        for content, logged in cases(self, [
                ("p\u00e2ss 1\n", "started"), ("two", "configuration reread"), ("", "not reloaded.*empty")]):
            save(secret, content)
            relay.signal(signal.SIGHUP) if relay.process else relay.start()
            relay.logged(logged)
            for password, code in ((content.strip() or "two", "235"), ("pass 1", "535"), ("", "535")):
                with Wire(relay.port) as client:
                    self.assertEqual(log_in(client, password=password)[:3], code)
        relay.end()
        self.assertEqual(relay.run()[0], 78)            # a name without a password does not start

    def test_failed_logins_are_slow_logged_and_limited(self):
        relay = self.relay(domain=LOGIN_OPTIONS, LOGIN_FAILED_S=0.2)
        with Wire(relay.port) as client:
            began = time.monotonic()
            replies = [log_in(client, *login)[:9] for login in (("gw", "x"), ("nobody",), ("gw", "y"))]
            self.assertEqual([*replies, client.reply()], ["535 5.7.8", "535 5.7.8", "421 4.7.0", ""])
            self.assertGreater(time.monotonic() - began, 0.6)
        line = relay.logged(r"^.*etrn_relay/smtpd\[\d+\]: warning: unknown\[127\.0\.0\.1\]: SASL CRAM-MD5 "
                            r"authentication failed: authentication failed, sasl_username=nobody$").group()
        if shutil.which("fail2ban-regex"):
            options = "postfix[mode=auth, _daemon=etrn_relay/smtpd, _port=]"
            done = subprocess.run(["fail2ban-regex", line, options], capture_output=True)
            self.assertIn(b"1 matched", done.stdout)

    def test_mail_goes_where_the_last_authenticated_etrn_came_from(self):
        old = self.primary(RCPT=HANG).start()
        new = self.primary(where=("127.0.0.3", old.port)).start()
        relay = self.relay("etrn", domain=LOGIN_OPTIONS, SMTP_PORT=old.port, PART_S=0.1)
        relay.send()
        relay.logged(r"relay=none, .*dsn=4\.4\.1, status=deferred \(waits for the domain's own mail server")
        one, (row,) = relay.json("--status")["domains"][DOMAIN], relay.queue()
        self.assertEqual([one["primary"], one["next_probe"], one["last_error"], row["next_attempt"],
                          row["recipients"][0]["attempts"]], ["unknown", None, etrn.WAITS["etrn"], None, 0])
        with relay.client() as client:
            self.assertEqual(client.say("ETRN " + DOMAIN)[:3], "250")       # a stranger moves nothing
        for source, primary, code in (("127.0.0.1", old, "253"), ("127.0.0.3", new, "25")):
            with Wire(relay.port, source) as client:
                self.assertEqual(log_in(client)[:3], "235")
                self.assertEqual(client.say("ETRN " + DOMAIN)[:len(code)], code)
            wait(lambda primary=primary: primary.uses["RCPT"], "a delivery there")
            relay.logged(r"primary\[\d+\]: ourdom\.example: at %s since an authenticated ETRN" % source)
        relay.until_empty()          # the old one is not waited for
        self.assertEqual((len(old.messages), len(new.messages)), (0, 1))
        relay.end()
        relay.start()                   # it is known after a restart, too
        relay.send()
        wait(lambda: len(new.messages) == 2)
        self.assertIn("at 127.0.0.3 since an authenticated ETRN", relay.run("--status")[1])


class Odmr(Secured):
    """ATRN: the customer comes for its mail."""

    def odmr(self, count=0, **options):
        """A relay whose domain's mail, so many messages, waits to be collected at self.port."""
        options = dict({"relay": ODMR, "domain": LOGIN_OPTIONS, "LOGIN_FAILED_S": 0.01}, **options)
        relay = self.relay(options.pop("primary", "atrn"), **options)
        self.port = int(relay.logged(r"ODMR on 127\.0\.0\.1:(\d+)").group(1))
        relay.read_spool()
        for number in range(count):
            relay.send(b"Subject: %d\r\n\r\n.dot\r\n" % number)
        return relay

    def visit(self):
        wire = Wire(self.port)
        self.assertEqual(log_in(wire)[:3], "235")
        return wire

    def collect(self, customer, command="ATRN"):
        """One visit of a customer, who then serves SMTP on its own connection.  Returns the reply to ATRN."""
        with self.visit() as wire:
            reply = wire.say(command)
            if reply[:3] == "250":
                customer._serve(wire.sock)
            return reply

    def test_mail_is_collected_over_the_customers_own_connection(self):
        relay, customer = self.odmr(), self.primary()
        self.assertEqual(self.collect(customer), "453 4.0.0 You have no mail")
        bodies = [b"Subject: %d\r\n\r\n.dot\r\n" % number for number in range(25)]
        for body in bodies:
            relay.send(body)
        relay.logged(r"to=<user@ourdom\.example>, relay=none, .*status=deferred \(waits to be collected by")
        self.assertEqual(self.collect(customer, "atrn OURDOM.example"),
                         "250 2.0.0 OK now reversing the connection")
        relay.until_empty()
        self.assertEqual([without_received(data) for _, _, data in customer.messages], bodies)
        self.assertEqual((customer.log[0], customer.log[-1]), ("ehlo backup.example.net", "QUIT"))
        relay.logged(r"flush\[\d+\]: atrn: site=ourdom\.example, client=unknown\[127\.0\.0\.1\], messages=25")
        relay.logged(r"to=<user@ourdom\.example>, relay=gw\.example\[127\.0\.0\.1\]:\d+, .* status=sent")
        self.kept(relay)
        wait(lambda: not relay.queue(), "an empty queue")
        one = relay.json("--status")["domains"][DOMAIN]
        self.assertEqual((one["primary"], one["delivered"], one["next_probe"]), ("unknown", 25, None))
        wait(lambda: self.collect(customer)[:3] == "453", "nothing left to collect")

    @unittest.skipUnless(shutil.which("strace"), "strace is not installed")
    def test_a_disk_that_lags_behind_keeps_nobody_from_collecting_all(self):
        relay, customer = self.odmr(4, UNRECORDED_MAX=1, FETCH_MOST=1, FETCH_LOW=0), self.primary()
        command = "strace -f -e trace=fsync -e inject=fsync:delay_enter=200000 -p %d" % relay.process.pid
        with subprocess.Popen(command.split(), stderr=subprocess.PIPE) as slow:
            self.addCleanup(slow.kill)
            self.assertIn(b"attached", slow.stderr.readline())
            self.assertEqual((self.collect(customer)[:3], len(customer.messages)), ("250", 4))
            slow.terminate()

    def test_mail_is_collected_within_tls(self):
        customer, options = self.primary(), "\n".join([LOGIN_OPTIONS, "tls = require", self.tls_section()])
        relay = self.odmr(domain=options)
        bodies = [MESSAGE, b"Subject: large\r\n\r\n" + b"y" * 70 + b"\r\n" * 200000]
        for body in bodies:
            relay.send(body)
        self.assertEqual(self.collect(customer)[:9], "530 5.7.0")       # tls = require
        with TlsWire(self.port) as wire:
            self.assertEqual((log_in(wire, mechanism="PLAIN")[:3], wire.say("ATRN")[:3]), ("235", "250"))
            customer._serve(wire.sock)
        relay.until_empty()
        self.assertEqual([without_received(data) for _, _, data in customer.messages], bodies)

    def test_each_domain_of_the_customer_has_its_turn(self):
        customer, relay = self.primary(), self.odmr(domain="\n".join([
            LOGIN_OPTIONS, "[domain .wild.example]", "primary = atrn", LOGIN_OPTIONS, "[domain no.example]",
            LOGIN_OPTIONS, "[domain other.example]", "primary = atrn", "username = other", "password = x"]))
        people = ["u@a.wild.example", "u@b.wild.example", "u@" + DOMAIN, "u@other.example"]
        relay.send(recipients=people)
        with self.visit() as wire:
            for domains, expected in cases(self, [
                    ("other.example", "450"), (DOMAIN + ",other.example", "450"), ("wild.example", "450"),
                    ("elsewhere.example", "450"), ("no.example", "453"), ("c.wild.example", "453")]):
                self.assertEqual(wire.say("ATRN " + domains)[:3], expected)
        for command, collected in (("ATRN a.wild.example, no.example", people[:1]), ("ATRN", people[:3])):
            self.assertEqual(self.collect(customer, command)[:3], "250")
            self.assertEqual(sorted(to for _, (to,), _ in customer.messages), collected)
            self.kept(relay)
        wait(lambda: [row["domain"] for row in relay.queue()] == ["other.example"], "the rest to be removed")
        self.assertEqual(customer.log.count("QUIT"), 2)     # the second visit's domains over one connection

    def test_two_customers_do_not_get_the_same_mail_and_count_as_connections(self):
        relay, customer = self.odmr(1), self.primary()
        self.kept(relay)
        with self.visit() as first, self.visit() as second:
            self.assertEqual([wire.say("ATRN")[:9] for wire in (first, second)], ["250 2.0.0", "451 4.3.0"])
            self.assertEqual(relay.json("--status")["connections"], 2)
            first.close()
            wait(lambda: second.say("ATRN")[:3] == "250", "the first to be gone")
            customer._serve(second.sock)
        relay.until_empty()
        self.assertEqual(len(customer.messages), 1)

    def test_who_is_silent_gives_way_to_the_next_and_what_was_said_early_counts(self):
        relay, customer = self.odmr(1, ATRN_SILENT_S=0.0), self.primary()
        for early, heard in cases(self, [(b"", ["250 "]),
                                         (b"220 early ESMTP\r\n250 early\r\n", ["250 ", "ehlo", "MAIL"])]):
            wait(lambda: relay.queue()[0]["state"] == "queued", "it to be written down")
            self.kept(relay)
            with self.visit() as silent, self.visit() as other:
                silent.raw(b"ATRN\r\n" + early)
                self.assertEqual([silent.reply()[:4] for _ in heard], heard)
                self.assertEqual(other.say("ATRN")[:9], "451 4.3.0")
                self.assertLessEqual(silent.lines.read().count(b"\n"), 1)       # hung up on, before DATA
        wait(lambda: self.collect(customer)[:3] == "250", "what broke off to be written down")
        self.assertEqual(len(customer.messages), 1)

    def test_a_customer_that_vanishes_loses_nothing(self):
        relay, customer = self.odmr(3), self.primary()
        for customer.script in cases(self, [
                {"greeting": CUT}, {"greeting": "554 no"}, {"greeting": b"\xff\r\n"}, {"EHLO": CUT},
                {"MAIL": CUT}, {"RCPT": "421 no"}, {"DATA": CUT}, {".": CUT}]):
            self.assertEqual(self.collect(customer)[:3], "250")
            self.kept(relay)
            wait(lambda: [row["state"] for row in relay.queue()] == ["queued"] * 3, "all to be written down")
            self.assertEqual(customer.messages, [])
            self.assertEqual(relay.json("--status")["domains"][DOMAIN]["primary"], "unknown")
        customer.script = {}
        self.assertEqual(self.collect(customer)[:3], "250")
        relay.until_empty()
        self.assertEqual(len(customer.messages), 3)

    def test_verdicts_are_taken_as_those_of_any_primary(self):
        relay, customer = self.odmr(), self.primary()
        for name in ("later", "never", "fine"):
            relay.send(recipients=["%s@%s" % (name, DOMAIN)])
        said = {"later": "450 4.2.0 later", "never": "550 5.1.1 who?"}
        customer.script["RCPT"] = lambda to: said.get(to[4:9])
        self.assertEqual(self.collect(customer)[:3], "250")
        wait(lambda: [row["state"] for row in relay.queue()] == ["queued"] * 2, "two messages to remain")
        people = [row["recipients"][0] for row in relay.queue()]
        self.assertEqual([(one["address"][:5], one["attempts"], one["last_response"][:3]) for one in people],
                         [("later", 1, "450"), ("never", 1, "550")])
        self.assertEqual([people for _, people, _ in customer.messages], [["fine@" + DOMAIN]])
        # Without a grace a refusal is final; also where the domain has a primary of its own.
        relay = self.odmr(2, primary=self.primary().address, domain=LOGIN_OPTIONS + "\nrecovery_grace = 0s")
        relay.logged(": down: ")
        customer = self.primary(RCPT=["550 5.1.1 who?", None])
        self.assertEqual(self.collect(customer)[:3], "250")
        relay.logged(r"ourdom\.example: up after ")
        relay.logged(r"to=<user@ourdom\.example>, relay=gw\.example.*status=bounced \(550 5\.1\.1 who")
        wait(lambda: len(customer.messages) == 1, "the second message")

    def test_who_waits_for_a_flush_of_such_mail_is_told_that_it_waits(self):
        relay = self.odmr(2)
        for is_running in cases(self, [True, False]):
            if not is_running:
                relay.end()
            self.assertEqual(relay.run("--flush", DOMAIN), (
                75, "%s: 0 delivered, 0 returned, 2 still waiting: %s\n" % (DOMAIN, etrn.WAITS["atrn"]), ""))
            self.assertIn("ourdom.example: " + etrn.WAITS["atrn"], relay.run("--status")[1])
            self.assertIn(etrn.WAITS["atrn"], relay.run("--queue")[1])

    def test_held_mail_is_not_collected_and_a_stop_ends_a_collection_in_order(self):
        relay = self.odmr(2)
        with self.visit() as wire:
            relay.run("--hold", DOMAIN)
            self.assertEqual(wire.say("ATRN")[:9], "451 4.3.0")
            relay.run("--release", DOMAIN)
            self.assertEqual(wire.say("ATRN")[:3], "250")
            began = time.monotonic()
            self.assertEqual(relay.end(), 0)            # it hangs before its 220
            self.assertLess(time.monotonic() - began, 5)
        relay.start()
        self.assertEqual(len(relay.queue()), 2)


class RealClients(Secured):
    """swaks, fetchmail and msmtp, as clients and as the customer of ODMR."""

    def test_swaks_sends_over_starttls_and_in_the_clear(self):
        relay = self.relay(domain=self.tls_section())
        command = [program("swaks"), "--server", "127.0.0.1:%d" % relay.port, "--helo", "swaks.example",
                   "--from", "a@sender.example", "--to", "u@%s,v@%s" % (DOMAIN, DOMAIN)]
        for options, tls, status in cases(self, [
                (["--tls"], "TLSv1.3", 0), ([], None, 0), (["--protocol", "SMTP"], None, 0),
                (["--pipeline"], None, 0), (["--to", "u@other.example", "--quit-after", "RCPT"], None, 24)]):
            done = subprocess.run(command + options, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
            self.assertEqual((done.returncode, b"554 5.7.1" in done.stdout), (status, status > 0))
            row = relay.queue()[-1]
            self.assertEqual((row["client"]["helo"], row["client"]["tls"]), ("swaks.example", tls))
            self.assertEqual(len(row["recipients"]), 2)

    def fetch(self, text):
        """Run it once; returns what it said."""
        file = self.path("fetchmailrc")
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600))
        save(file, "set no bouncemail\n%s fetchdomains ourdom.example other.example\n" % text)
        command = [program("fetchmail"), "-f", file, "-v", "--nodetach", "--pidfile", file + ".pid"]
        done = subprocess.run(command, env=dict(os.environ, HOME=self.folder, FETCHMAILHOME=self.folder),
                              capture_output=True, timeout=DEADLINE_S)
        return (done.stdout + done.stderr).decode("utf-8", "replace")

    def test_it_collects_a_queue(self):
        relay = self.relay("atrn", relay=ODMR, domain="\n".join([
            LOGIN_OPTIONS, "[domain other.example]", LOGIN_OPTIONS]))
        customer, port = self.primary().start(), relay.logged(r"ODMR on 127\.0\.0\.1:(\d+)").group(1)
        text = 'poll 127.0.0.1 protocol ODMR port %s auth cram-md5 %s smtphost 127.0.0.1/%d' % (
            port, 'username "gw" password "se cret"', customer.port)
        bodies = [b"Subject: one\r\n\r\n.dot\r\n", b"Subject: two\r\n\r\n" + b"line\r\n" * 2000]
        relay.read_spool()
        for body in bodies:
            relay.send(body)
        said = self.fetch(text)
        relay.until_empty(said)
        self.assertEqual([without_received(data) for _, _, data in customer.messages], bodies)
        wait(lambda: (relay.queue(), relay.json("--status")["connections"]) == ([], 0), "its end")
        self.assertIn("You have no mail", self.fetch(text))

    def test_its_authenticated_etrn_tells_where_the_primary_is(self):
        customer = self.primary().start()
        relay = self.relay("etrn", SMTP_PORT=customer.port, domain="\n".join([
            LOGIN_OPTIONS, "[domain other.example]", "primary = etrn", LOGIN_OPTIONS]))
        relay.send(recipients=["u@" + DOMAIN, "u@other.example"])
        said = self.fetch("poll 127.0.0.1 protocol ETRN port %d %s" % (
            relay.port, 'esmtpname "gw" esmtppassword "se cret"'))
        relay.until_empty(said)
        relay.logged(r"etrn: site=other\.example, client=unknown\[127\.0\.0\.1\], messages=1, reply=253")

    def test_fetchmail_and_msmtp_ask_for_their_domains(self):
        for name in cases(self, ["fetchmail", "msmtp"]):
            path, primary, slow = program(name), self.primary(), "probe_interval = 1h\n"
            other = "[domain other.example]\n%sprimary = %s" % (slow, primary.address)
            relay = self.relay(primary, domain=slow + other, PROBE_FIRST_S=3600.0)
            for one in (DOMAIN, "other.example"):
                relay.send(recipients=["u@" + one])
                relay.logged(re.escape(one) + ": down: ")
            primary.start()
            if name == "fetchmail":
                self.fetch("poll 127.0.0.1 service %d proto ETRN" % relay.port)
            for one in ("x.example", DOMAIN, "other.example") if name == "msmtp" else ():
                done = subprocess.run([path, "--file=/dev/null", "--host=127.0.0.1", "--rmqs=" + one,
                                       "--port=%d" % relay.port], capture_output=True)
                self.assertEqual(done.returncode, 69 if one == "x.example" else 0, done.stdout)
            relay.until_empty()


# -- notices, alerts

class Bounces(Relays):
    """Notices to senders; a scripted primary plays the smarthost."""

    def relay_to_sink(self, primary=None, domain="lifetime = 1s", **options):
        self.sink = self.primary().start()
        return self.relay(primary, smarthost=self.sink.address, domain=domain, **options)

    def notice(self, relay):
        """The first notice, its part about the message, and that about the first recipient."""
        wait(lambda: self.sink.messages, "a notice")
        relay.until_empty()
        notice = email.message_from_bytes(self.sink.messages[0][2], policy=email.policy.default)
        whole, one, *_ = list(notice.iter_parts())[1].get_payload()
        return notice, whole, one

    def test_expired_mail_is_returned_to_its_sender(self):
        relay = self.relay_to_sink()
        relay.send(b"Subject: lost\r\nX: y\r\n\r\nsecret\r\n", parameters=" ENVID=QQ1 RET=HDRS",
                   recipients=["<u@%s> ORCPT=rfc822;old@x.example" % DOMAIN, "<v@%s> NOTIFY=NEVER" % DOMAIN])
        notice, whole, one = self.notice(relay)
        _, status, headers = notice.iter_parts()
        self.assertEqual(self.sink.messages[0][:2], ("", ["a@sender.example"]))
        self.assertEqual((notice.get_content_type(), status.get_content_type(), notice["Auto-Submitted"]),
                         ("multipart/report", "message/delivery-status", "auto-replied"))
        self.assertEqual((whole["Original-Envelope-Id"], one["Action"], one["Status"], one["Final-Recipient"],
                          one["Original-Recipient"]),
                         ("QQ1", "failed", "4.4.7", "rfc822; u@" + DOMAIN, "rfc822; old@x.example"))
        self.assertIn("Connection refused", one["Diagnostic-Code"])
        self.assertIn("Subject: lost", headers.get_content())
        self.assertNotIn("secret", self.sink.messages[0][2].decode())
        relay.logged(r"smtp\[\d+\]: [0-9A-F]+: to=<u@ourdom\.example>, .*status=expired \(")
        relay.logged(r"bounce\[\d+\]: [0-9A-F]+: sender non-delivery notification: [0-9A-F]+")

    def test_an_operator_returns_mail_and_a_notice_that_is_refused_goes_to_the_postmaster(self):
        relay = self.relay_to_sink(domain="", bounces="postmaster = postmaster@x.example")
        self.sink.script["RCPT"] = lambda to: "250 ok" if "postmaster@" in to else "550 5.1.1 no such user"
        relay.send()
        relay.logged(": down: ")
        wait(lambda: relay.run("--bounce", DOMAIN)[0] == 0, "it to be at rest")
        self.assertIsNotNone(self.notice(relay)[0]["Message-ID"])
        self.assertEqual(self.sink.messages[0][:2], ("", ["postmaster@x.example"]))
        self.assertIn(b"a@sender.example", self.sink.messages[0][2])
        relay.logged(r"to=<user@ourdom\.example>, .*dsn=5\.0\.0, status=bounced \(Returned by the postmaster")

    def test_a_server_that_comes_back_half_configured_loses_nobodys_mail(self):
        primary = self.primary(RCPT="550 5.1.1 no such user")
        relay = self.relay_to_sink(primary, "recipients = verify\ncutthrough = yes\nretry_interval = 1s")
        for number in range(5):
            relay.send(recipients=["u%d@%s" % (number, DOMAIN)])
        relay.logged(": down: ")
        primary.start()
        relay.logged(r"primary\[\d+\]: warning: ourdom\.example: rejecting: 550 5\.1\.1 no such user, 5 mess")
        status = relay.json("--status")["domains"][DOMAIN]
        self.assertEqual((status["primary"], status["queued"], status["bounced"]), ("rejecting", 5, 0))
        for number in range(6):         # nor is anybody turned away at the door
            self.assertEqual(relay.send(recipients=["u%d@%s" % (number, DOMAIN)])[:3], "250")
        primary.script.clear()
        relay.until_empty()
        relay.logged(r": up after rejecting for \d+s, 11 messages waiting")
        self.assertEqual((len(primary.messages), self.sink.messages), (11, []))


@contextlib.contextmanager
def webhook(said=b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"):
    """The options of a web hook that answers so, or not at all, and the bodies of its POSTs."""
    bodies = []

    def serve():
        with contextlib.suppress(OSError):
            while True:
                sock = server.accept()[0]
                with sock, sock.makefile("rb") as lines:
                    size = [int(line[15:]) for line in iter(lines.readline, b"\r\n")
                            if line.lower().startswith(b"content-length:")]
                    bodies.append(lines.read(*size))
                    sock.sendall(said) if said else sock.recv(1)    # until somebody has had enough of it
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        yield "[alerts]\nafter = 0s\nwebhook = http://127.0.0.1:%d/x\n" % server.getsockname()[1], bodies
        server.shutdown(socket.SHUT_RDWR)


class Alerting(Relays):
    """People are told: a program, a web hook, a mail."""

    def test_an_outage_its_end_and_a_refusal_reach_program_web_hook_and_mail(self):
        primary, sink = self.primary(), self.primary().start()
        told, program = self.path("told"), self.path("tell me.sh")
        save(program, "#!/bin/sh\nexec >>$1\ntest $ETRN_EVENT = up && sleep 0.5\n"
                      "printf '%s ' $ETRN_EVENT $ETRN_DOMAIN $ETRN_WAITING\ncat\necho\n")
        os.chmod(program, 0o700)
        with webhook() as (options, bodies):
            relay = self.relay(primary, domain=options + "command = '%s' %s\nmail = admin@home.example\n"
                               "mail_route = %s\n" % (program, told, sink.address))
            for _ in range(3):
                relay.send()
            wait(lambda: len(bodies) == 1, "the alert")
            primary.script["RCPT"] = "550 5.1.1 \x1b[2J nobody"
            primary.start()
            wait(lambda: len(bodies) == 3, "two more")
            primary.script.clear()
            wait(lambda: len(bodies) == 4 and len(sink.messages) == 4, "the last")
        alerts = [json.loads(body) for body in bodies]
        self.assertEqual([(one["event"], one["domain"], one["host"]) for one in alerts],
                         [(word, DOMAIN, "backup.example.net") for word in ("down", "up", "rejecting", "up")])
        self.assertEqual([one["waiting"] for one in alerts[1:3]], [3, 3])
        self.assertRegex(alerts[0]["text"] + alerts[1]["text"], r"Connection refused.*up after \d+s, 3 mess")
        self.assertTrue(all(one["text"].isprintable() for one in alerts))
        wait(lambda: load(told).count("\n") == 4, "the program")
        for line, alert in zip(load(told).splitlines(), alerts):
            event, domain, waiting, body = line.split(" ", 3)
            self.assertEqual((event, domain, int(waiting), json.loads(body)),
                             (alert["event"], DOMAIN, alert["waiting"], alert))
        mails = [email.message_from_bytes(data, policy=email.policy.strict) for _, _, data in sink.messages]
        self.assertEqual({(sender, *to) for sender, to, _ in sink.messages}, {("", "admin@home.example")})
        self.assertEqual({mail["Auto-Submitted"] for mail in mails}, {"auto-generated"})
        events = sorted(mail["Subject"].split()[-1] for mail in mails)
        self.assertEqual(events, ["down", "rejecting", "up", "up"])
        relay.until_empty()

    def test_what_cannot_be_told_is_logged_without_secrets_and_holds_nothing_up(self):
        refused = b"HTTP/1.1 500 no\r\nContent-Length: 0\r\n\r\n"
        primary = self.primary().start()
        relay = self.relay(primary)
        for said, options, expected in cases(self, [
                (refused, "", "webhook: .*500"), (b"HTTP/1.1 200 " + b"x" * 70000, "", "webhook: "),
                (b"\x1b[2J\r\n\r\n", "", r"webhook: \\x1b\[2J"),
                (refused, "command = /nowhere/program", "command: .*No such file"),
                (b"", "command = sh -c 'exit 3' secret", "command: exit status 3$")]):
            with webhook(said) as (hook, _):
                self.reload(relay, "configuration reread", domain=hook + options)
                since = len(relay.log)
                primary.stop()
                relay.send()
                relay.logged("error: alert not told by " + expected, since)
                primary.start()
                since = len(relay.log)
                relay.signal(signal.SIGUSR1)
                relay.logged("error: alert not told by " + expected, since)     # of its return
                relay.until_empty()
        self.assertTrue(all(line.isprintable() and "secret" not in line for line in relay.log))


# == 13. COMMANDS ==============================================================

class Commands(Relays):
    """Each command, with a relay and without one."""

    def both(self, more=0):
        """A relay with three or more messages in two domains, its primary down: running, then stopped."""
        for self.is_running in (True, False):
            self.down = self.primary()
            relay = self.relay(self.down, domain="[domain two.example]\nprimary = " + self.down.address)
            relay.send(b"From x\r\nSubject: one\r\n\r\nFrom here\r\n>From there\r\n", sender="one@x.example")
            relay.send(sender="", recipients=["a@" + DOMAIN, "b@" + DOMAIN, "c@two.example"])
            for _ in range(more):
                relay.send()
            for name in (DOMAIN, "two.example"):
                relay.logged(re.escape(name) + ": down: ")
            if not self.is_running:
                self.assertEqual(relay.end(), 0)
            yield relay

    def test_queue_status_show_and_export_tell_as_the_contract_says(self):
        for relay in self.both():
            rows = relay.queue()
            self.assertEqual([(row["domain"], row["sender"], [one["address"] for one in row["recipients"]])
                              for row in rows], [(DOMAIN, "one@x.example", ["user@" + DOMAIN]),
                                                 (DOMAIN, "", ["a@" + DOMAIN, "b@" + DOMAIN]),
                                                 ("two.example", "", ["c@two.example"])])
            self.assertEqual(len({row["id"] for row in rows}), 3)
            client = {"address": "127.0.0.1", "helo": "client.example", "tls": None}
            for row in rows:
                self.assertEqual(set(row), set(
                    "id domain state sender size received expires next_attempt client recipients".split()))
                self.assertEqual(row["size"], os.path.getsize(relay.at(row["id"] + ".eml")))
                self.assertEqual((row["state"], row["client"]), ("queued", client))
                self.assertAlmostEqual(row["expires"] - row["received"], 7 * 86400, delta=1)
                self.assertEqual(set(row["recipients"][0]), {"address", "attempts", "last_response"})
            for what, code, shown in cases(self, [(DOMAIN, 0, 2), ("@example", 0, 3), ("@two.example", 0, 1),
                                                  (rows[2]["id"], 0, 1), ("other.example", 1, 0)]):
                got, text, _ = relay.run("--queue", what)
                self.assertEqual((got, sum(row["id"] in text for row in rows)), (code, shown))
            status = relay.json("--status")
            self.assertEqual(set(status), {"version", "pid", "uptime", "connections", "spool", "domains"})
            self.assertEqual(status["pid"], relay.process.pid if self.is_running else None)
            self.assertGreater(status["spool"].pop("free"), 0)
            self.assertEqual(status["spool"], {"messages": 3, "held": 0, "corrupt": 0,
                                               "bytes": sum(row["size"] for row in rows)})
            one = status["domains"][DOMAIN]
            self.assertEqual(set(one), set("primary since queued bytes oldest accepted delivered bounced "
                                           "deferred expired last_error next_probe".split()))
            self.assertEqual((one["primary"], one["queued"], one["accepted"], one["oldest"]),
                             ("down", 2, 2, rows[0]["received"]))
            self.assertIn("Connection refused", one["last_error"])
            self.assertIn(DOMAIN, relay.run("--status")[1])
            # --show and --export
            id = rows[0]["id"]
            with open(relay.at(id + ".eml"), "rb") as file:
                self.assertEqual(relay.run("--show", id.lower(), "--raw"), (0, file.read().decode(), ""))
            text = relay.run("--show", id)[1]
            self.assertEqual(("one@x.example" in text, "Subject: one" in text), (True, True))
            self.assertEqual(relay.json("--show", id)["sender"], "one@x.example")
            code, text, _ = relay.run("--export", DOMAIN)
            self.assertEqual((code, re.findall(r"(?m)^From (\S+) \w{3} \w{3} ", text), len(relay.files())),
                             (0, ["one@x.example", "MAILER-DAEMON"], 6))

    def test_hold_release_and_delete_one_message_a_domain_and_all(self):
        for relay in self.both():
            first = relay.queue()[0]["id"]
            for command, what, held in cases(self, [
                    ("--hold", first, 1), ("--release", first, 0), ("--hold", DOMAIN, 2),
                    ("--release", DOMAIN, 0), ("--hold", "all", 3), ("--release", "@two.example", 2),
                    ("--release", "all", 0)]):
                self.assertEqual(relay.run(command, what)[0], 0)
                self.assertEqual([row["state"] for row in relay.queue()].count("held"), held)
                self.assertEqual(relay.json("--status")["spool"]["held"], held)
                if (command, what) == ("--hold", DOMAIN):
                    code, _, errors = relay.run("--release", first)
                    self.assertEqual((code, errors.count("all of %s is held" % DOMAIN)), (75, 1))
                    self.assertEqual(relay.run("--flush", DOMAIN)[0], 75)
            first, *others = (row["id"] for row in relay.queue())
            wait(lambda relay=relay, first=first: relay.run("--delete", first)[0] == 0)
            self.assertEqual([row["id"] for row in relay.queue()], others)
            self.assertEqual([relay.run("--delete", what)[0] for what in (first, "all")], [1, 64])
            wait(lambda relay=relay: relay.run("--delete", "all", "--yes")[0] == 0)
            self.assertEqual((relay.queue(), relay.files()), ([], []))

    def test_flush_waits_and_tells_what_became_of_the_mail(self):
        for relay in self.both(20):
            self.assertEqual((relay.run("--flush", DOMAIN)[0], len(relay.files())), (69, 46))
            late = DOMAIN if self.is_running else "two.example"
            self.down.script["RCPT"] = lambda to: "450 4.2.0 no" if self.is_running or "two" in to else None
            self.down.start()
            wait(lambda relay=relay, late=late: relay.run("--flush", late)[0] == 75, "it to be deferred")
            self.assertEqual(len(relay.files()), 46)
            self.down.script.clear()
            if not self.is_running:             # a primary of which nothing is known is tried at once
                os.unlink(relay.at("state.json"))
            with shorten(LOAD_BATCH=1):         # what is read last is counted, too
                code, text, _ = relay.run("--flush", DOMAIN, "--json")
            told = json.loads(text)
            self.assertEqual((code, told["queued"], told["delivered"], told["waiting"]), (0, 22, 22, 0))
            self.assertEqual([relay.run("--flush", one)[0] for one in ("all", "all", "x.example")], [0, 0, 1])
            self.assertEqual((len(self.down.messages), relay.files()), (23, []))

    def test_who_only_reads_writes_nothing(self):
        relay = self.relay(domain="delay_notice = 1s")
        for _ in range(4):
            relay.send()
        good, grown, finished, late = (row["id"] for row in relay.queue())
        relay.end(signal.SIGKILL)
        for id, old, new in ((finished, '"state":"queued"', '"state":"delivered"'),
                             (late, '"received":17', '"received":16')):
            path = relay.at(id + ".json")
            save(path, load(path).replace(old, new))
        with open(relay.at(grown + ".eml"), "ab") as file:
            file.write(b"x")

        def tree():
            found = {os.path.join(where, name): os.lstat(os.path.join(where, name))
                     for where, folders, names in os.walk(relay.spool) for name in folders + names
                     if name != "lock"}
            return {name: (one.st_ino, one.st_size, one.st_ctime) for name, one in found.items()}
        before = tree()
        for line in cases(self, ["--status", "--queue", "--show " + good, "--export " + good]):
            with shorten(SWEEP_S=0.001):
                self.assertEqual((relay.run(*line.split())[0], tree()), (0, before))
        relay.start()                   # which does mend it
        relay.logged("moved to corrupt/: %s.json %s.eml" % (grown, grown))
        wait(lambda: finished + ".json" not in relay.files(), "it to be removed")

    def test_a_bug_in_a_command_does_not_leave_it_waiting(self):
        relay = self.relay(LIST_BATCH=0)        # a step of nothing: range() does not like it
        relay.send()
        done = relay.command("--queue", timeout=DEADLINE_S)
        self.assertEqual((done.returncode, done.stderr), (69, b"etrn_relay.py: the relay broke off\n"))

    def test_usage_help_and_errors_of_the_configuration(self):
        relay = Relay(self.folder)
        self.assertEqual((relay.queue(), relay.json("--status")["spool"]["messages"]), ([], 0))
        with mock.patch.dict(os.environ, {"ETRN_RELAY_CONFIG": relay.file}):
            self.assertIn(DOMAIN, json.loads(run("--status", "--json")[1])["domains"])
        self.assertEqual(run("--config", self.path("none.conf"), "--status")[0], 78)
        relay.write_config(domain="zzz = 1")
        code, _, errors = relay.run()
        self.assertEqual((code, errors, os.path.exists(relay.spool)),
                         (78, relay.file + ":17: unknown option 'zzz'\n", False))
        code, text, _ = run("--help")
        self.assertEqual((code, max(map(len, text.split("\n"))) < 81, text.count("\n") < 51), (0, True, True))
        for name in cases(self, "bounce check delete demo export flush hold print-unit probe queue release "
                                "show status config json no-wait raw yes version".split()):
            self.assertIn("--" + name, text)
        self.assertEqual(run("--version"), (0, "etrn_relay %s\n" % etrn.__version__, ""))


# -- the status page

FOREIGN = "<script>alert('x')</script>\"><img src=x onerror=y>&amp;\x1b[31m\r\n\u202egpj.exe\x00%s{0}\ud800"
WALL = 1764104472.0


def facts(**changes):
    """One primary down, one up, one rejecting; with `text` wherever foreign text can stand."""
    text = changes.pop("text", "connect to 192.0.2.1:25: Connection refused")
    history = etrn.History()
    for at in range(0, 8 * 86400, 420):
        state = "down" if at % 54000 < 5400 else "up"
        history.note("example.com", at // 60 % 90, state, WALL - 8 * 86400 + at)
    history.note("example.com", 1841, "down", WALL)
    one = {"since": WALL - 3600, "bytes": 4120, "oldest": WALL - 3600, "held": False, "next_probe": WALL + 4,
           "accepted": 12, "delivered": 10, "bounced": 0, "deferred": 4, "expired": 0, "last_error": text,
           "address": None, "primary": "down", "queued": 1841}
    idle = dict(one, queued=0, bytes=0, oldest=None, last_error="", next_probe=None, primary="up")
    spool = {"messages": 1843, "bytes": 8240, "free": 1 << 35, "held": 0, "corrupt": 0, "sick": None,
             "loading": False, **changes.pop("spool", {})}
    domains = {"example.com": one, "example.org": idle, "notice:" + text: dict(one, queued=1),
               text: dict(one, primary="rejecting", queued=2, held=True, address=text)}
    status = {"version": "0.1", "pid": 71, "uptime": 7200.0, "connections": 3, "spool": spool,
              "domains": domains}
    notable = [(WALL - 90, "primary", text, "warning"), (WALL - 4, text, text, text)]
    return etrn.Facts(etrn.Now(1e9, WALL), "backup.example.net", status, WALL - 7200, 100 << 20, "",
                      WALL + 9e6, history, notable)._replace(**changes)


TAGS = ("html head meta title style body main header h1 h2 p dl div dt dd small section span b figure "
        "figcaption svg path ol li footer a form input button pre")
ATTRIBUTES = ("lang charset name content http-equiv class href d viewBox preserveAspectRatio aria-hidden "
              "action value placeholder")
TAG = re.compile(r'<(?:!DOCTYPE html|/?(?:%s)(?: (?:%s)="[^"<>]*")*/?)>' % (
    TAGS.replace(" ", "|"), ATTRIBUTES.replace(" ", "|")))


def texts_of(page):
    """What a browser shows.  Nothing may look like a tag but the few that the page is made of."""
    text = TAG.sub(" ", page)
    assert not re.search("[<>]", text), text
    return " ".join(html.unescape(text).split())


FAMILY = re.compile(r'# HELP (etrn_relay_\w+) \S.*\n# TYPE \1 (gauge|counter)\n'
                    r'((?:\1(?:\{(?:[a-z]+="(?:[^"\\\n]|\\[\\"n])*",?)+\})? \S+\n)+)')


def parse_metrics(text):
    """Prometheus text format 0.0.4, strictly."""
    families = {}
    while text:
        match = FAMILY.match(text)
        assert match and match.group(1) not in families, text
        name, kind, lines = match.groups()
        assert (kind == "counter") == name.endswith("_total"), name
        samples = [line[len(name):].rpartition(" ") for line in lines[:-1].split("\n")]
        families[name] = (kind, {labels.strip("{}"): float(value) for labels, _, value in samples})
        assert len(families[name][1]) == len(samples), lines
        text = text[match.end():]
    return families


class Page(unittest.TestCase):
    """What is made of values: no socket, no clock."""

    def setUp(self):
        patch = mock.patch.dict(os.environ, TZ="UTC")
        patch.start()
        time.tzset()
        self.addCleanup(time.tzset)
        self.addCleanup(patch.stop)

    def test_every_foreign_text_is_escaped(self):
        page = etrn.format_page(facts(
            text=FOREIGN, hostname=FOREIGN, load_error=FOREIGN, spool={"sick": FOREIGN}))
        self.assertGreater(texts_of(page).count("<script>alert('x')</script>\"><img"), 5)
        self.assertEqual([c for c in page if not c.isprintable() and c != "\n"], [])

    def test_the_page_says_what_a_postmaster_must_know(self):
        page = texts_of(etrn.format_page(facts()))
        for text in cases(self, [
                "Primary down: example.com. Waiting: 1841 messages.", "Primary rejecting: connect", "1,843",
                "Connection refused", "in 4s", "7 days, peak 1,841", "trouble in 23 hours", "no trouble",
                "Recent events", "refuses below 100M", "20:59:42", "since 25 Nov 2025, 20:01:12, for 1h",
                "etrn_relay 0.1, up 2h, process 71", "12 accepted", "10 Mar 2026", "32.0G"]):
            self.assertIn(text, page)
        for changes, reasons, text in cases(self, [
                ({}, [], "Primary down"),
                ({"load_error": "EACCES"}, ["spool unreadable: EACCES"], "unreadable: EACCES"),
                ({"spool": {"sick": "EIO"}}, ["spool sick: EIO"], "Spool sick: EIO"),
                ({"spool": {"free": 1000}}, ["disk short: 1000B free"], "Disk short: 1000B"),
                ({"spool": {"free": 0}, "min_free": 0}, ["disk short: 0B free"], "Disk short: 0B"),
                ({"spool": {"sick": "x", "free": 0}}, ["spool sick: x", "disk short: 0B free"], "Spool sick"),
                ({"spool": {"loading": True}}, [], "still being read")]):
            found, top = facts(**changes), etrn.format_page(facts(**changes)).partition("<dl")[0]
            self.assertEqual((text in top, "All is well" in top), (True, False))
            ills = [ill[:len(reason)] for ill, reason in zip(etrn.find_ills(found), reasons)]
            self.assertEqual((ills, len(etrn.find_ills(found))), (reasons, len(reasons)))       # of /healthz
        well = facts()
        for one in well.status["domains"].values():
            one["primary"] = "up"
        self.assertIn("All is well", etrn.format_page(well))

    def test_hundreds_of_domains_make_a_bounded_page_and_those_in_trouble_stand_first(self):
        many = facts(text="refusing.example")
        for name in ["d%04d.example" % number for number in range(3000)]:
            many.status["domains"][name] = many.status["domains"]["example.org"]
            for hour in range(170):
                many.history.note(name, 99 * hour, ("up", "down")[hour % 2], WALL - 3600 * hour)
        page = etrn.format_page(many)
        self.assertLess(len(page), 1000000)
        self.assertEqual(re.findall("<h2><a [^>]*>(.*?)</a></h2>", page)[:2],
                         ["example.com", "refusing.example"])
        self.assertIn("And 2903 domains", page)

    def test_the_policy_allows_this_very_style_and_nothing_else(self):
        style = etrn.format_page(facts()).partition("<style>")[2].partition("</style>")[0]
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        expected = dict.fromkeys(["default-src", "base-uri", "form-action", "frame-ancestors"], "'none'")
        expected.update({"style-src": "'sha256-%s'" % digest, "form-action": "'self'"})
        parts = [part.strip().partition(" ") for part in etrn.PAGE_POLICY.split(";")]
        self.assertEqual({name: value for name, _, value in parts}, expected)

    def test_metrics_are_prometheus_text(self):
        families = parse_metrics(etrn.format_metrics(facts(text=FOREIGN)))
        self.assertFalse(any("notice:" in labels for _, samples in families.values() for labels in samples))
        self.assertEqual(sum(families["etrn_relay_primary_state"][1].values()), 3)
        bare = facts(certificate_end=0.0, spool={"sick": "EIO"})
        bare.status["domains"].clear()
        ill = parse_metrics(etrn.format_metrics(bare))
        label = 'domain="example.com"'
        for name, kind, labels, value, other in cases(self, [
                ("healthy", "gauge", "", 1, 0), ("spool_free_bytes", "gauge", "", 1 << 35, 1 << 35),
                ("certificate_expiry_timestamp_seconds", "gauge", "", WALL + 9e6, 0),
                ("queue_messages", "gauge", label, 1841, None),
                ("queue_oldest_timestamp_seconds", "gauge", label, WALL - 3600, None),
                ("messages_accepted_total", "counter", label, 12, None)]):
            found, samples = families["etrn_relay_" + name]
            self.assertEqual((found, samples[labels]), (kind, value))
            self.assertEqual(ill.get("etrn_relay_" + name), None if other is None else (kind, {"": other}))


class Histories(unittest.TestCase):
    """A week of each domain, for the page: bounded, kept, and believed only where it makes sense."""

    def test_a_history_stays_bounded_and_survives_a_save(self):
        chance, history = random.Random(822), etrn.History()
        names = ["d%d.example" % number for number in range(etrn.HISTORY_DOMAINS_MAX + 20)]
        for step in range(600):             # three weeks and more
            for name in names[:2] if step else names:
                history.note(name, chance.randrange(2000), chance.choice(["up", "down"]), WALL + 3600 * step)
        values = json.loads(json.dumps(history.to_values(WALL)))
        self.assertEqual(len(values["domains"]), etrn.HISTORY_DOMAINS_MAX)
        self.assertEqual(max(map(len, values["domains"].values())), etrn.HISTORY_HOURS)
        again = etrn.History()
        again.from_values(values)
        self.assertEqual(again.domains, history.domains)
        self.assertEqual(set(history.to_values(WALL + 3600 * 600)["domains"]), set(names[:2]))
        history.note("new.example", 1, "up", WALL + 3600 * 600)
        self.assertIn("new.example", history.domains)

    def test_columns_show_peaks_and_the_worst_state(self):
        history, start = etrn.History(), WALL - WALL % 3600
        for at, depth, state in (
                (0, 5, "unknown"), (9, 5, "up"), (3600, 0, "up"), (3700, 90, "up"), (3710, 0, "rejecting"),
                (10900, 0, "down"), (10905, 1, "up"), (10910, 0, "rejecting")):
            history.note(DOMAIN, depth, state, start + at)
        columns = history.columns(DOMAIN, start + 4 * 3600 + 5)
        self.assertEqual((len(columns), columns[-6:]), (168, [
            (0, "off"), (5, "up"), (90, "rejecting"), (0, "off"), (1, "down"), (0, "off")]))
        self.assertEqual(history.columns("other.example", start), [(0, "off")] * 168)

    def test_nonsense_in_the_file_is_forgotten(self):
        good = {"domains": {"a": [[490000, 3, "up"]]}, "sites": {"a": {"depth": []}}}
        rows = ([float("nan"), 1, "up"], [1, -1, "up"], [1, 10 ** 400, "up"], [1, 1, FOREIGN])
        odd = [{"domains": {"a": [row]}} for row in rows]
        for values in cases(self, [*SpoolPeople.variants(good), *odd]):
            history = etrn.History()
            history.from_values(values)
            for hours in history.to_values(WALL)["domains"].values():
                self.assertTrue(all(type(at) is int and depth >= 0 and state == "up"
                                    for at, depth, state in hours))


def fetch(port, path="/", method="GET", **headers):
    """Status, header fields and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode("utf-8")


def basic(user, password):
    return "Basic " + base64.b64encode(("%s:%s" % (user, password)).encode()).decode()


STATUS_PAGE = "[status]\nlisten = 127.0.0.1:0\n"


class PageRelays(Relays):
    """Tests with a relay that has a status page."""

    def page(self, relay, since=0):
        return int(relay.logged(r"status page on http://127\.0\.0\.1:(\d+)/", since).group(1))

    def serve(self, token="", **options):
        """A relay with a page; its port."""
        self.running = self.relay(bounces=STATUS_PAGE + ("token = %s" % token if token else ""), **options)
        return self.page(self.running)

    def raw(self, port, data):
        with connect(port) as sock:
            sock.sendall(data)
            return read_all(sock)


class PageOverHttp(PageRelays):
    """What a browser, a scraper and an attacker see; and what becomes of it while the relay lives."""

    def test_paths_and_methods(self):
        port = self.serve()
        for path, kind in cases(self, [("/", "text/html"), ("/metrics", "text/plain; version=0.0.4"),
                                       ("/status.json?x=y", "application/json"), ("/healthz", "text/plain")]):
            status, fields, body = fetch(port, path)
            self.assertEqual((status, fields["Content-Type"]), (200, kind + "; charset=utf-8"))
            self.assertEqual(fetch(port, path, "HEAD")[::2], (200, ""))
            self.assertEqual(int(fields["Content-Length"]), len(body.encode()))
            for name, value in (("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"),
                                ("Content-Security-Policy", etrn.PAGE_POLICY)):
                self.assertEqual(fields[name], value)
        for method in cases(self, ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "FLUSH"]):
            status, fields, _ = fetch(port, "/", method)
            self.assertEqual((status, fields["Allow"]), (405, "GET, HEAD"))
        for path in cases(self, ["/x", "/metrics/", "/..%2fmetrics", "/favicon.ico", "/status"]):
            self.assertEqual(fetch(port, path)[0], 404)

    def test_malformed_and_endless_requests(self):
        port = self.serve()
        for data, expected in cases(self, [
                (b"GET / HTTP/9.9\r\n\r\n", b"505"), (b"GET / X\r\n\r\n", b"400"),      # RFC 9110 2.5
                (b"\x16\x03\x01\r\n\r\n", b"400"), (b"GET /metrics HTTP/1.1\n\n", b"200"),
                (b"GET / HTTP/1.1\r\nA: " + b"x" * 70000, b"431"), (b"A: b\r\n" * 10000, b"431"),
                (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 4000 + b"\r\n", b"431"),
                (b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", b"405")]):
            self.assertEqual(self.raw(port, data)[:12], b"HTTP/1.0 " + expected)
        self.assertNotIn(b"<script>", self.raw(port, b"GET <script> HTTP/1.1 <script>\r\n\r\n"))
        self.assertEqual(fetch(port, "/healthz")[::2], (200, "ok\n"))
        self.assertEqual([line for line in self.running.log if "Traceback" in line], [])

    def test_the_token_guards_all_but_healthz(self):
        port = self.serve("s3cret:x", LOGIN_FAILED_S=0.01)
        for given, status in cases(self, [
                *((given, 200) for given in (
                    "Bearer s3cret:x", "bearer  s3cret:x", basic("any", "s3cret:x"), basic("", "s3cret:x"))),
                *((given, 401) for given in (
                    "", "Bearer", "Bearer s3cret", "Bearer s3cret:xx", "Bearer S3CRET:X", "Basic s3cret:x",
                    "Basic !!!", "Digest s3cret:x", "s3cret:x", basic("s3cret:x", ""),
                    basic("a", "b\xff")))]):
            for path in ("/", "/metrics", "/status.json", "/none"):
                got, fields, body = fetch(port, path, **({"Authorization": given} if given else {}))
                self.assertEqual(got, status if path != "/none" or status == 401 else 404)
                self.assertEqual(fields["WWW-Authenticate"],
                                 None if got != 401 else 'Basic realm="etrn_relay", charset="UTF-8"')
                self.assertFalse(got == 401 and DOMAIN in body)
        self.assertEqual(fetch(port, "/healthz")[0], 200)
        self.assertEqual(fetch(port, "/", "POST")[0], 405)
        self.running.logged(r"http.*: refused: GET /none from unknown.127\.0\.0\.1.: 401 wrong token")
        self.assertEqual([line for line in self.running.log if "s3cret" in line.lower()], [])

    def test_health_is_503_with_the_reason(self):
        port = self.serve()
        self.reload(self.running, "configuration reread", min_free_space="4000000G")
        status, _, body = fetch(port, "/healthz")
        self.assertEqual((status, body[:11]), (503, "disk short:"))
        self.assertIn("Disk short:", fetch(port)[2])

    def test_twenty_readers_at_once_wait_their_turn(self):
        """None of them is reset."""
        port = self.serve(PAGE_CONNECTIONS=4)
        readers = self.connected(port, 25)
        for sock in readers:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        for sock in readers:
            answer = read_all(sock)
            sock.close()                # which makes room for the next
            self.assertEqual((answer[9:12], answer[-8:]), (b"200", b"</html>\n"))

    def test_slow_clients_neither_block_nor_stay(self):
        port = self.serve(PAGE_TOTAL_S=1.0)
        slow = self.connected(port, 5)
        for sock in slow:
            sock.sendall(b"GET / HTT")
        self.assertEqual(fetch(port, "/healthz")[0], 200)
        for sock in slow:
            with contextlib.suppress(ConnectionError):
                self.assertNotIn(b" 200 ", sock.recv(1000))

    def test_the_page_shows_an_outage_and_remembers_it(self):
        primary = self.primary()
        relay = self.relay(primary, bounces=STATUS_PAGE)
        relay.send()
        relay.logged(": down: ")
        port = self.page(relay)
        self.assertIn("Primary down: %s.  Waiting: 1 message." % DOMAIN, fetch(port)[2])
        shown, told = json.loads(fetch(port, "/status.json")[2]), relay.json("--status")
        for one in (shown, told):
            self.assertGreater(one.pop("uptime"), 0)
            self.assertGreater(one["spool"].pop("free"), 0)
            del one["domains"][DOMAIN]["next_probe"]
        self.assertEqual(shown, told)
        primary.start()
        relay.until_empty()
        name = "etrn_relay_messages_delivered_total"
        wait(lambda: parse_metrics(fetch(port, "/metrics")[2])[name][1]['domain="%s"' % DOMAIN] == 1,
             "the delivery to be counted")
        self.assertIn("%s: down: connect to " % DOMAIN, fetch(port)[2])
        self.assertEqual(relay.end(), 0)
        (_, peak, state), *_ = json.loads(load(relay.at("history.json")))["domains"][DOMAIN]
        self.assertEqual((peak, state), (1, "down"))
        mark = len(relay.log)
        relay.start()
        self.assertIn("peak <b>1</b>", fetch(self.page(relay, mark))[2])

    def test_a_hangup_moves_the_page_and_changes_the_token(self):
        port = self.serve("one")
        relay = self.running
        self.assertEqual(fetch(port, Authorization="Bearer one")[0], 200)
        self.reload(relay, "configuration reread", bounces=STATUS_PAGE + "token = two")
        for token, status in (("one", 401), ("two", 200)):
            self.assertEqual(fetch(port, Authorization="Bearer " + token)[0], status)
        relay.logged("http.*: refused: GET / from unknown.127.0.0.1.: 401 wrong token")
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self.reload(relay, "not reloaded, .* stays: cannot listen on .*: Address already in use",
                        bounces="[status]\nlisten = 127.0.0.1:%d" % taken.getsockname()[1])
        self.assertEqual(fetch(port, Authorization="Bearer two")[0], 200)
        mark = len(relay.log)
        moved = unused_port()
        self.reload(relay, bounces="[status]\nlisten = localhost:%d" % moved)
        self.assertEqual((self.page(relay, mark), fetch(moved)[0]), (moved, 200))
        self.reload(relay, "configuration reread", bounces="")
        for gone in cases(self, [port, moved]):
            with self.assertRaises(OSError):
                fetch(gone)
        self.assertEqual(relay.send()[:3], "250")


class MailInBrowser(PageRelays):
    """The queue and its messages on the page: who may read them, and what a hostile message can do there."""

    def get(self, path, token="s3cret", method="GET"):
        return fetch(self.port, path, method, Authorization=basic("me", token))

    def start(self, **options):
        other = "[domain two.example]\nprimary = 127.0.0.1:9\nrecipients = any"
        self.port = self.serve("s3cret", domain="token = mine\n" + other, **options)
        return self.running

    def ids(self, path="/queue/" + DOMAIN):
        return re.findall("/message/([0-9A-F]+)", self.get(path)[2])

    def test_who_may_read_what(self):
        relay = self.start(LOGIN_FAILED_S=0.01)
        relay.send()
        relay.send(recipients=["u@two.example"])
        one, two = (row["id"] for row in sorted(relay.queue(), key=lambda row: row["domain"] != DOMAIN))
        own = ["/queue/" + DOMAIN, "/queue/%s.mbox" % DOMAIN, "/message/" + one, "/message/%s.eml" % one]
        other = ["/queue/two.example", "/queue/two.example.mbox", "/message/" + two, "/message/%s.eml" % two]
        for token, path, status in cases(self, [
                *(("s3cret", path, 200) for path in own + other), *(("mine", path, 200) for path in own),
                *(("mine", path, 403) for path in [*other, "/metrics", "/status.json", "/queue/no.example",
                                                   "/message/ABCDEF", "/favicon.ico"]),
                *((token, path, 401) for path in own for token in ("x", "")), ("mine", "/", 302),
                ("s3cret", "/queue/none.example", 404), ("s3cret", "/message/ABCDEF", 404),
                ("s3cret", "/queue/../" + DOMAIN, 404), ("s3cret", "/message/..%2fstate", 404)]):
            self.assertEqual(self.get(path, token)[0], status)
            self.assertEqual(fetch(self.port, path)[0], 401)
        self.assertEqual(self.get("/message/" + two, "mine")[2], self.get("/message/ABCDEF", "mine")[2])
        self.assertEqual(self.get("/", "mine")[1]["Location"], "/queue/" + DOMAIN)
        self.assertEqual([line for line in relay.log if "refused: GET /message/ABCDEF" in line], [])
        relay.logged("refused: GET /message/%s from unknown.127.0.0.1.: 401 wrong token" % one)
        self.port = self.serve(domain="")
        for path in cases(self, own):
            self.assertEqual((fetch(self.port, path)[0], "token" in fetch(self.port, path)[2]), (403, True))

    def test_a_token_of_several_domains(self):
        """One on a section of subdomains, another on two sections; with octets that latin-1 knows as a
        line end and as a blank."""
        section = "[domain %s]\nprimary = 127.0.0.1:9\nrecipients = any\ntoken = %s\n"
        self.port = self.serve("", domain="token = " + "b\u00c5b\u00e0\n" + section % (
            "two.example", "b\u00c5b\u00e0") + section % (".sub.example", "below"), LOGIN_FAILED_S=0.01)
        self.running.send(recipients=["u@a.sub.example"])
        id = self.running.queue()[0]["id"]
        for token, path, status in cases(self, [
                ("below", "/queue/a.sub.example", 200), ("below", "/message/" + id, 200),
                ("below", "/queue/sub.example", 403), ("below", "/queue/notice:a.sub.example", 403),
                ("below", "/queue/" + DOMAIN, 403), ("b\u00c5b\u00e0", "/queue/two.example", 200),
                ("b\u00c5b\u00e0", "/message/" + id, 403), ("x", "/message/" + id, 401),
                ("x", "/message/ABCDEF", 401), ("", "/message/ABCDEF", 401)]):
            self.assertEqual(self.get(path, token)[0], status)
            bearer = "Bearer " + token.encode().decode("latin-1")
            self.assertEqual(fetch(self.port, path, Authorization=bearer)[0], status)
        page = fetch(self.port, "/none", Authorization=basic("", "b\u00c5b\u00e0"))
        self.assertEqual(page[0], 404)
        page = self.get("/message/" + id, "b\u00c5b\u00e0")[2]
        self.assertEqual(re.findall('href="([^"]*)"', page), ["/queue/" + DOMAIN, "/queue/two.example"])

    def test_a_list_has_the_newest_first_in_pages_and_is_searched(self):
        relay = self.start()
        subjects = ["=?utf-8?q?M=C3=A4rz_1?=", *("n%d" % number for number in range(2, 121))]
        for number, subject in enumerate(subjects):
            relay.send(("From: F%d\r\nSubject: %s\r\n\r\nx\r\n" % (number, subject)).encode())
        path = "/queue/" + DOMAIN
        newest = [row["id"] for row in reversed(relay.queue())]
        for query, found in cases(self, {
                "": newest[:50], "?page=2": newest[50:100], "?page=3": newest[100:], "?page=4": [],
                "?page=-1": newest[:50], "?q=m%C3%A4RZ": newest[-1:],
                "?q=F7": [newest[-8], *newest[40:50]],
                "?q=user@" + DOMAIN: newest[:50], "?q=user&page=3": newest[100:], "?q=%3Cx": []}.items()):
            self.assertEqual(sorted(self.ids(path + query)), sorted(found))
        page = self.get(path + "?q=user&page=2")[2]
        texts_of(page)
        self.assertEqual(re.findall('href="([^"]*)">(newer|older)', page), [
            ("?q=user&amp;page=1", "newer"), ("?q=user&amp;page=3", "older")])
        self.assertIn("120 messages waiting", page)
        query = "\u00e4" * 400
        self.assertIn("%C3%A4" * 400 + "&amp;page=2", etrn.format_list_page(
            "h", DOMAIN, [], query, 1, 0, True))

    def test_a_hostile_message_is_text(self):
        relay = self.start()
        evil = "<script>alert(1)</script>"
        parts = ("--b\r\nContent-Type: text/html; charset=%s\r\n\r\n<head><title>t</title></head>"
                 "<body onload=x><script>alert(2)</script><p>Hello &lt;b&gt; <img src=//x>"
                 "<a href=//x>link</a>\r\n--b\r\nContent-Type: application/x; "
                 "name=\"<img onerror=x>.exe\"\r\n\r\nxx\r\n--b--\r\n")
        head = "Subject: %s\r\nFrom: %s <a@b>\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n" % (
            evil, evil)
        deep = b"".join(b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n" % (at, at)
                        for at in range(300))
        for data, shown in cases(self, [
                *(((head + parts % charset).encode(), [evil, "Hello <b> link", "<img onerror=x>.exe (appl"])
                  for charset in ("utf-8", "none-such", "zip", "punycode")),
                (b"Subject: =?utf-8?b?!!?= \xff\x1b[31m\r\n\r\n\x80\xff \x9b31m\r\n",
                 [r"\x1b[31m", "\ufffd31m"]),
                (b"Subject: long\r\n\r\n" + b"x" * 3000000 + b"\r\n", ["The text is cut", "first 1.0M"]),
                (b"no header\r\n\r\nbody\r\n", ["(no subject)"]), (b"\r\nall body\r\n", ["all body"]),
                (b"Subject: deep\r\n" + deep + b"\r\nbottom\r\n", ["deep", "too many parts", "bottom"]),
                (b"Subject: rfc\r\n" + b"Content-Type: message/rfc822\r\n\r\n" * 2000 + b"x\r\n", ["rfc"]),
                (b"To: " + b", ".join(b"u%d@b" % at for at in range(2000)) + b"\r\n\r\nx\r\n", ["u1@b"]),
                (b"Content-Transfer-Encoding: base64\r\n\r\n!!!\r\n", []), (b"Content-Type: text/html\r\n\r\n"
                 + b"<a " * 200000 + b"\r\n", ["It was HTML"]),
                (b"Content-Type: text/html\r\n\r\n<!-- a > b -->c&#" + b"9" * 5000 + b";d\r\n", ["c;d"]),
                *((b"Content-Disposition: attachment; filename*=%s''x\r\n\r\nhi\r\n" % charset,
                   ["Attachment", "(text/plain, "])
                  for charset in (b"idna", b"undefined", b"%00", b"utf-7''+2AA-",
                                  b"unicode_escape''%5Cud800")),
                (b"Content-Type: text/plain; charset*1=x; charset=y\r\n\r\nhi there\r\n", ["hi there"]),
                (b"Content-Type: text/plain; a=\"" + b";" * 1000000 + b"\r\n\r\nquick\r\n", []),
                (b"Content-Type: multipart/mixed; boundary=b\r\n\r\nno \xe2\x82\xac\r\n", ["no \u20ac"]),
                (b"Content-Disposition: attachment; filename=M\xc3\xa4rz\r\n\r\nx\r\n", ["M\u00e4rz"]),
                (b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + b"--b\r\n\r\n" * 20000,
                 ["too many parts"]),
                (b"Content-Type: message/delivery-status\r\n\r\n" + b"\r\n" * 40000, ["too many parts"])]):
            self.assertEqual(relay.send(data)[:3], "250")
            id, = self.ids()
            status, fields, page = self.get("/message/" + id)
            self.assertEqual((status, fields["Content-Type"]), (200, "text/html; charset=utf-8"))
            for text in shown:
                self.assertIn(text, texts_of(page))
            self.assertNotIn("alert(2)", page)
            self.assertLess(len(page), 500000)
            texts_of(self.get("/queue/" + DOMAIN)[2])
            with open(relay.at(id + ".eml"), "rb") as file:
                answer = self.raw(self.port, ("GET /message/%s.eml HTTP/1.0\r\nAuthorization: %s\r\n\r\n" % (
                    id, basic("", "mine"))).encode())
                fields, _, body = answer.partition(b"\r\n\r\n")
                self.assertEqual(body, file.read())
            self.assertIn(b"\r\nContent-Length: %d" % len(body), fields)
            self.assertIn(b"\r\nContent-Disposition: attachment; filename=", fields)
            self.assertIn(b"\r\nX-Content-Type-Options: nosniff", fields)
            relay.run("--delete", id)
            for path, status in (("/message/" + id, 200), ("/message/%s.eml" % id, 410)):
                self.assertEqual(self.get(path)[0], status)
                self.assertRegex(self.get(path)[2], r"\A%s: deleted at " % id)
        self.assertEqual([line for line in relay.log if "bug" in line], [])

    def test_a_download_takes_its_time_and_a_request_does_not(self):
        relay = self.start(PAGE_TOTAL_S=0.1)
        relay.send(b"x" * 8000000 + b"\r\n")
        path = "/message/%s.eml" % relay.queue()[0]["id"]
        with connect(self.port) as slow, connect(self.port) as sock:
            slow.sendall(b"GET / HTTP/1.0\r\n")
            sock.sendall(("GET %s HTTP/1.0\r\nAuthorization: %s\r\n\r\n" % (
                path, basic("", "mine"))).encode())
            self.assertEqual(slow.recv(1), b"")             # cut off after 0.1 s
            self.assertGreater(len(b"".join(iter(lambda: sock.recv(65536), b""))), 8000000)

    def test_the_whole_queue_is_what_export_gives(self):
        relay = self.start()
        for data in (MESSAGE, b"x\r\nFrom here\r\n" * 60000):
            relay.send(data)
        whole = self.get("/queue/%s.mbox" % DOMAIN)
        self.assertEqual(whole[2], relay.run("--export", DOMAIN)[1])
        self.assertEqual(self.get("/queue/%s.mbox" % DOMAIN, method="HEAD")[::2], (200, ""))
        pieces = iter([b"x" * etrn.BLOCK_OCTETS, *[b"y"] * 1000])      # not one by one
        self.assertEqual([etrn.read_on(pieces)[1], etrn.read_on(pieces)], [False, (b"y" * 1000, True)])

    def test_a_body_that_is_gone_is_not_an_empty_download(self):
        relay = self.start()
        relay.send()
        id, = self.ids()
        os.remove(relay.at(id + ".eml"))
        for path in cases(self, ["/message/" + id, "/message/%s.eml" % id]):
            status, _, text = self.get(path)
            self.assertEqual((status, text[-20:]), (404, "gone.  The log may tell.\n"[-20:]))

    def test_who_has_left_is_not_waited_for(self):
        server, work = mock.Mock(), mock.Mock()
        server.loop.now.mono = 0.0
        page = etrn.HttpServer(server)
        streams = [mock.Mock(is_closed=False) for _ in range(3)]
        for stream in streams:
            page._send(mock.Mock(), stream, iter([b"x"]), work)
        streams[1].is_closed = True
        server.loop.in_thread.call_args[0][1]((b"x", True))
        server.loop.later.call_args[0][1]()
        self.assertEqual(([one[0] for one in page.jobs], server.loop.in_thread.call_count), ([streams[2]], 2))


class Terminal(unittest.TestCase):
    """What commands show to people."""

    def setUp(self):
        waiting = [("example.com", "queued"), ("example.com", "held"), ("long.example.org", "delivering")]
        recipient = {"address": "u@example.com", "state": "queued", "attempts": 3, "next_attempt": WALL + 240,
                     "expires": WALL + 9e5, "last_attempt": WALL - 60, "last_response": "450 4.2.0" + FOREIGN}
        self.rows = [
            {"id": "6611F58B85C7%d" % number, "domain": domain, "state": state, "size": 4120,
             "sender": "somebody@sender.example", "received": WALL - 7300 * number,
             "next_attempt": None if state == "held" else WALL + 95,
             "recipients": [dict(recipient, address="user%d@%s" % (n, domain)) for n in range(number + 1)]}
            for number, (domain, state) in enumerate(waiting)]
        self.sidecar = {
            "id": "6611F58B85C7A", "domain": "example.com", "received": WALL - 5000, "size": 4120,
            "sha256": "0" * 64, "sender": "a@b.example", "held": True,
            "client": {"address": "192.0.2.7", "helo": FOREIGN, "tls": None},
            "recipients": [recipient, dict(recipient, state="delivered", address="done@example.com")]}

    def texts(self):
        status, header = facts(text=FOREIGN * 3).status, ("Subject: " + FOREIGN).encode("utf-8", "replace")
        return [etrn.format_queue(self.rows, WALL), etrn.format_status(status, WALL),
                etrn.format_envelope(self.sidecar, header, WALL)]

    def test_nothing_foreign_reaches_the_terminal(self):
        for text in self.texts():
            self.assertTrue(all(c.isprintable() or c == "\n" for c in text))

    def test_queue_status_and_envelope_say_what_is_asked(self):
        queue, status, envelope = self.texts()
        offline = facts(text="x.example", spool={"sick": "EIO", "loading": True}).status
        offline.update(pid=None, uptime=None)
        for text, pattern in cases(self, [
                (queue, r"(?m)^3 messages, 12K, 1 held$"), (queue, r"user0@\S+, user1"),
                (queue, r"(?m)^6611F58B85C71 +2h1m  4\.0K  held +- +<somebody@sender.example> "),
                (queue, r"(?m)^example.com: 450 4\.2\.0<"),
                *((envelope, pattern) for pattern in (
                    r"next try in 4m, expires in 10d10h", r"(?m)^ID .*, held until", r"(?m)^Subject: ",
                    r"<done@example.com>: delivered, 3 attempts\n", r"1m ago: 450 4.2.0<script>")),
                *((status, pattern) for pattern in (
                    r"running for 2h, process 71, 3 connections", r"(?m)^example.com +down +1h +1841 ",
                    r"(?m)^example.org +up +1h +0 +0B +- +- ", r"at <script>.* since an authenticated ETRN")),
                *((etrn.format_status(offline, WALL), words) for words in (
                    ": not running\n", "spool SICK: EIO\n", "still being read", "\nnotices to x.ex"))]):
            self.assertRegex(text, pattern)
        self.assertEqual(envelope.count("expires"), 1)
        self.assertEqual(etrn.format_queue([], WALL), "The queue is empty.\n")

    def test_an_mbox_can_be_read_back_and_nothing_breaks_out_of_it(self):
        message = b"Subject: x\r\n\r\nFrom here\r\n>From there\r\n\r\nFrom\r\nlast"
        self.sidecar["sender"] = "a b\u00e9@b.example\nFrom x"
        self.sidecar["recipients"][0]["address"] = "u@example.com\nX: y\ud800"
        whole = b"".join(etrn.format_mbox(self.sidecar, [message]))
        for size in cases(self, range(1, 9)):           # however it is read
            blocks = [message[at:at + size] for at in range(0, len(message), size)]
            self.assertEqual(b"".join(etrn.format_mbox(self.sidecar, blocks)), whole)
        self.assertEqual(whole.split(b"\n"), [
            b"From a_b_@b.example_From_x Tue Nov 25 19:37:52 2025",
            b"X-Envelope-From: <a b\xc3\xa9@b.example_From x>",
            b"X-Envelope-To: <u@example.com_X: y?>", b"Subject: x", b"", b">From here", b">>From there", b"",
            b"From", b"last", b"", b""])
        first = next(etrn.format_mbox(dict(self.sidecar, sender=""), [b"x"]))
        self.assertEqual(first[:19], b"From MAILER-DAEMON ")


class Units(Folder):
    """--print-unit"""
    NASTY = "it's a \"50%\" $HOME & <b>;.conf"

    def unit(self, kind, text="", name="etrn.conf"):
        path = self.path(name)
        save(path, text)
        code, out, errors = run("--print-unit", kind, "--config", path)
        self.assertEqual((code, errors), (0, ""))
        return out

    def test_every_kind_names_this_script_this_python_and_the_configuration(self):
        path = self.path("etrn.conf")
        for kind in cases(self, sorted(etrn.UNITS)):
            code, out, errors = run("--print-unit", kind, "--config", path)
            self.assertEqual((code, "Set  spool = " in errors), (0, True))
            for word in (sys.executable, SOURCE, path):
                self.assertIn(word, out)
            self.assertIn(path, self.unit(kind))
            os.unlink(path)
        self.assertEqual(run("--print-unit", "sysv")[0], 64)
        save(path, "[relay]\nnonsense = 1\n")
        self.assertEqual(run("--print-unit", "systemd", "--config", path)[0], 78)
        nowhere = mock.patch.object(os.path, "exists", return_value=False)
        with nowhere, mock.patch.dict(os.environ, ETRN_RELAY_CONFIG=""):
            self.assertIn("--config /etc/etrn.conf\n", run("--print-unit", "systemd")[1])

    def test_what_cannot_be_written_in_a_unit_is_refused(self):
        for kind, name in cases(self, itertools.product(etrn.UNITS, ("a\nb", "a\u202eb", "a\x7f"))):
            code, out, errors = run("--print-unit", kind, "--config", self.path(name))
            self.assertEqual((code, out, "cannot be written in a unit" in errors), (64, "", True))

    def test_a_systemd_unit_gives_what_the_configuration_needs_and_no_more(self):
        always = ["Type=notify", "WatchdogSec=60",
                  "ProtectSystem=strict", "NoNewPrivileges=yes", "Restart=on-failure",
                  'ExecReload=/bin/sh -c "kill -HUP ${MAINPID}"', "RestartPreventExitStatus=78 64",
                  "CapabilityBoundingSet=CAP_NET_BIND_SERVICE", "UMask=0077"]
        for text, lines, absent in cases(self, [
                ("spool = /var/lib/etrn_relay/q", [
                    "DynamicUser=yes", "StateDirectory=etrn_relay/q", "ReadWritePaths="],
                 "User=root"),
                ("user = mail\nspool = /srv/mail spool\nlog = /srv/log/relay.log", [
                    "User=mail", 'ReadWritePaths="/srv/mail spool" /srv/log', "StateDirectory=",
                    'RequiresMountsFor="/srv/mail spool" /srv/log'], "DynamicUser"),
                ("spool = /var/lib/a:b", [
                    "ReadWritePaths=/var/lib/a:b", "User=root", "StateDirectory="], "DynamicUser")]):
            out = self.unit("systemd", "[relay]\n%s\n" % text)
            self.assertEqual([line for line in lines + always if line not in out.split("\n")], [])
            self.assertNotIn(absent, out)

    def test_words_that_systemd_would_take_apart_are_quoted(self):
        self.assertIn('/it\'s a \\"50%%\\" $$HOME & <b>;.conf"\n', self.unit("systemd", name=self.NASTY))

    @unittest.skipUnless(shutil.which("systemd-analyze"), "systemd-analyze is not installed")
    def test_systemd_itself_finds_nothing_wrong(self):
        path = self.path("etrn_relay.service")
        for text in cases(self, ["spool = /var/lib/etrn_relay", "user = mail\nspool = a b%%c"]):
            save(path, self.unit("systemd", "[relay]\n%s\n" % text, self.NASTY))
            done = subprocess.run(["systemd-analyze", "verify", "--man=no", path], stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, check=False)
            about_us = [line for line in done.stdout.decode().split("\n") if "etrn_relay" in line]
            self.assertEqual((about_us, done.returncode), ([], 0))

    def test_the_others_hand_on_each_word_whole(self):
        command = [sys.executable, SOURCE, "--config", self.path(self.NASTY)]
        for kind, prelude, script in cases(self, [
                ("openrc", "", 'eval printf "\'%s\\n\'" $command $command_args\n'),
                ("procd", "procd_open_instance() { :; }; procd_close_instance() { :; }\n"
                 'procd_set_param() { [ "$1" != command ] || { shift; printf "%s\\n" "$@"; }; }\n',
                 "start_service\n")]):
            done = subprocess.run(["sh", "-c", prelude + self.unit(kind, "", self.NASTY) + script],
                                  capture_output=True)
            self.assertEqual((done.returncode, done.stderr), (0, b""))
            self.assertEqual(done.stdout.decode("utf-8").split("\n"), [*command, ""])
        read = plistlib.loads(self.unit("launchd", name=self.NASTY).encode("utf-8"))
        self.assertEqual((read["ProgramArguments"], read["KeepAlive"]), (command, {"SuccessfulExit": False}))


class Probes(Relays):
    """--probe says what a delivery would meet, and sends nothing."""

    def probe(self, primary, domain="", zone=None):
        """Exit status, what --json says (of the host, where there is one), and what people read."""
        with Dns(zone or {}) as dns:
            one = Relay(self.folder, primary, domain=domain, nameservers=str(dns.endpoint))
            code, out, _ = one.run("--probe", DOMAIN, "--json")
            again, text, _ = one.run("--probe", DOMAIN)
        self.assertEqual((again, os.path.exists(one.spool)), (code, False))
        found = json.loads(out)
        return code, found["hosts"][0] if found["hosts"] else found, text

    def test_a_primary_that_takes_mail_is_shown_and_nothing_is_sent(self):
        primary = self.primary(QUIT=CUT).start()
        code, host, text = self.probe(primary.address)
        self.assertEqual((code, host["takes_mail"], host["error"]), (0, True, None))
        self.assertEqual([host["greeting"], host["mail"], host["rcpt"], *sorted(host["extensions"])], [
            "220 primary.example ESMTP", "250 2.1.0 ok", "250 2.1.5 ok", "8BITMIME", "DSN", "PIPELINING",
            "SIZE 1000000", "SMTPUTF8"])
        half = ["ehlo backup.example.net", "MAIL FROM:<>", "RCPT TO:<postmaster@%s>" % DOMAIN, "QUIT"]
        self.assertEqual((primary.log, primary.messages), (half * 2, []))
        for word in ("primary.example ESMTP", "PIPELINING", "takes_mail: True"):
            self.assertIn(word, text)

    def test_the_exit_status_tells_refused_from_unreachable_and_from_foreign(self):
        primary = self.primary().start()
        for script, status, word in cases(self, [
                ({"RCPT": "550 5.1.1 no postmaster"}, 75, "rcpt: 550 5.1.1 no postmaster"),
                ({"greeting": "554 5.3.2 go away"}, 69, "554 5.3.2 go away"),
                (None, 69, "Connection refused")]):
            if script is None:
                primary.stop()
            primary.script = script or {}
            code, host, text = self.probe(primary.address)
            self.assertEqual((code, host["takes_mail"], word in text), (status, False, True))
        for name, status, word in cases(self, [("other.example", 1, "no such dom"), ("a b", 64, "neither")]):
            code, out, errors = Relay(self.folder).run("--probe", name, "--json")
            self.assertEqual((code, out, word in errors), (status, "", True))

    def test_a_probe_ends_although_nobody_answers(self):
        for stage, text, status in cases(self, [
                ("greeting", "no answer", 69), ("EHLO", "no answer", 69), ("RCPT", "timed out", 75)]):
            primary = self.primary(**{stage: HANG}).start()
            with shorten(PROBE_REPLY_S=0.3, PROBE_HOSTS_S=0.5):
                code, host, _ = self.probe(primary.address)
            self.assertEqual((code, text in host["error"]), (status, True))
        with Dns({}, mangle=lambda packet: None) as dns, shorten(PROBE_ROUTE_S=0.2):
            relay = Relay(self.folder, "mx", nameservers=str(dns.endpoint))
            code, out, _ = relay.run("--probe", DOMAIN, "--json")
        self.assertEqual((code, json.loads(out)["hosts"], "no answer" in out), (69, [], True))

    def test_the_certificate_is_shown_and_the_policy_of_the_domain_holds(self):
        files = make_certificate(self, "mx.primary.example")
        primary = self.primary(SecurePrimary, files[0]).start()
        pin = hashlib.sha256(ssl.PEM_cert_to_DER_cert(load(files[0]))).hexdigest()
        for policy in cases(self, ["may", "require", "sha256:" + pin]):
            code, host, _ = self.probe(primary.address, "tls = %s\n" % policy)
            self.assertEqual((code, host["sha256"], host["tls"][:6]), (0, pin, "TLSv1."))
        for policy, code, word in cases(self, [("none", 0, "takes_mail: True"), ("verify", 69, "failed"),
                                               ("sha256:" + "0" * 64, 69, pin)]):
            got, _, text = self.probe(primary.address, "tls = %s\n" % policy)
            self.assertEqual((got, word in text), (code, True), text)
        zone = {("mx.primary.example", etrn.A): ["127.0.0.1"]}
        with mock.patch.dict(os.environ, SSL_CERT_FILE=files[0]):
            where = "mx.primary.example:%d" % primary.port
            self.assertEqual(self.probe(where, "tls = verify", zone=zone)[0], 0)
            self.assertIn("127.0.0.1", self.probe(primary.address, "tls = verify")[1]["error"])     # the name

    def test_the_route_holds_what_a_delivery_would_try(self):
        mx = {(DOMAIN, etrn.MX): [(10, "a.example"), (20, "backup.example.net"), (20, "peer.example")],
              ("a.example", etrn.A): ["127.0.0.2"], ("backup.example.net", etrn.A): ["127.0.0.3"],
              ("peer.example", etrn.A): ["127.0.0.4"]}
        with mock.patch.object(etrn, "SMTP_PORT", self.primary().port):
            code, host, text = self.probe("mx", zone=mx)
        self.assertEqual((code, host["address"], text.count("address: ")), (69, "127.0.0.2", 1))
        for primary, zone, word in cases(self, [
                ("mx", {(DOMAIN, etrn.MX): [(0, "")]}, "null MX"), ("mx", {}, "no such name"),
                ("etrn", {}, "authenticated ETRN")]):
            code, found, text = self.probe(primary, zone=zone)
            self.assertEqual((code, word in found["error"], word in text), (69, True, True))


class Checks(Relays):
    """--check says what will not work, and changes nothing."""

    def check(self, zone=None, **options):
        with Dns(zone or {}) as dns:
            one = Relay(self.folder, nameservers=str(dns.endpoint), **options)
            before = sorted(os.listdir(self.folder))
            code, out, _ = one.run("--check", "--json")
            self.assertEqual(sorted(os.listdir(self.folder)), before)       # nothing is changed
        return code, json.loads(out)

    def found(self, level, text, **options):
        code, findings = self.check(**options)
        is_there = any(one["level"] == level and text in one["text"] for one in findings)
        self.assertTrue(is_there, (level, text, findings))
        self.assertEqual(code, 78 if any(one["level"] == "error" for one in findings) else 0)

    def test_the_dns_should_know_this_host_and_a_better_one(self):
        name = "backup.example.net"
        for level, text, zone in cases(self, [
                ("warning", "no such name: " + name, {}), ("ok", "1.1.1.1", {(name, etrn.A): ["1.1.1.1"]}),
                *((level, text, {(DOMAIN, etrn.MX): records}) for level, text, records in (
                    ("ok", "10 mx.example, 20 " + name, [(10, "mx.example"), (20, name)]),
                    ("warning", name + " should be among them", [(10, "mx.example")]),
                    ("warning", "behind a better host", [(10, name), (10, "mx.example")]),
                    ("warning", "behind a better host", [(10, name), (20, "mx.example")])))]):
            self.found(level, text, zone=zone)

    def test_the_primary_is_reached_or_there_is_somebody_who_may_come(self):
        primary = self.primary().start()
        self.found("ok", "it answers", primary=primary.address)
        self.assertEqual(primary.log, ["ehlo backup.example.net"])
        primary.stop()
        self.found("warning", "Connection refused", primary=primary.address)
        login, odmr = "username = u\npassword = p", "odmr_listen = 127.0.0.1:0"
        for kind, relay, domain, level in cases(self, [
                ("atrn", "", login, "error"), ("atrn", odmr, "", "error"), ("atrn", odmr, login, "ok"),
                ("etrn", "", login, "ok"), ("etrn", "", login + "\netrn = none", "error")]):
            self.found(level, "mail waits", primary=kind, relay=relay, domain=domain)

    def test_files_it_needs(self):
        self.found("error", "No such file", domain="recipients = file:users")
        save(self.path("users"), "\ufeffuser@%s OK\r\nnonsense\n" % DOMAIN)
        for level, text, options in cases(self, [
                ("warning", "; not an address in line 2", {"domain": "recipients = file:users"}),
                ("error", "none: No such file", {"bounces": "username = u\npassword = file: none"}),
                ("error", "none.pem", {"bounces": "[tls]\ncertificate = none.pem\nkey = none.key"}),
                ("error", "/users: [SSL]", {"bounces": "[tls]\ncertificate = users\nkey = users"}),
                ("error", "cannot write", {"relay": "log = none/relay.log"})]):
            self.found(level, text, **options)
        save(self.path("spool"), "")
        self.found("error", "spool is not a directory")

    def test_what_starts_and_does_not_serve(self):
        self.found("warning", "an alert would wait", bounces="[alerts]\nmail = me@" + DOMAIN)
        self.found("ok", "1 domain", bounces="[alerts]\nmail = me@elsewhere.example")
        for sockets, level in cases(self, [(("/nowhere/log",), "warning"), (("/", "/nowhere/log"), "ok")]):
            with mock.patch.object(etrn, "SYSLOG_SOCKETS", sockets):
                _, findings = self.check(relay="log = syslog")
            self.assertEqual(any("nobody listens" in one["text"] for one in findings), level == "warning")
        save(self.path("none.conf"), "[relay]\nlisten = 127.0.0.1:0\nmin_free_space = 0\n")
        out = run("--config", self.path("none.conf"), "--check", "--json")[1]
        self.assertIn({"level": "warning", "what": "config", "text": self.path("none.conf") + ": 0 domains"},
                      json.loads(out))

    def test_the_spool_must_be_of_use_to_its_account(self):
        spool = self.path("spool")
        self.found("error", "no such account", relay="user = nosuchuser")
        if os.geteuid() != 0:
            self.skipTest("only root can become another account")
        os.chmod(self.folder, 0o711)
        self.found("warning", "systemd does not make it", relay="user = nobody")
        os.chmod(self.path("etrn.conf"), 0o600)
        self.found("error", "nobody cannot read " + self.path("etrn.conf"), relay="user = nobody")
        os.chmod(self.path("etrn.conf"), 0o644)
        os.mkdir(spool, 0o700)
        self.found("error", "nobody cannot write", relay="user = nobody")
        nobody = pwd.getpwnam("nobody").pw_uid
        os.chown(spool, nobody, -1)
        code, findings = self.check(relay="user = nobody")
        self.assertEqual(code, 0, findings)
        lock, secret = os.path.join(spool, "lock"), self.path("secret")
        save(lock, "")                              # root left it behind
        os.chmod(lock, 0o600)
        self.found("error", "nobody cannot write " + lock, relay="user = nobody")
        os.chown(lock, nobody, -1)
        save(secret, "u@%s\n" % DOMAIN)
        os.chmod(secret, 0o600)                     # root reads it, and then is root no more
        for text, options in cases(self, [
                (secret + ": Permission denied", {"domain": "username = u\npassword = file:" + secret}),
                (secret + ": Permission denied", {"domain": "recipients = file:" + secret}),
                (secret + ": Permission denied", {"bounces": "username = u\npassword = file:" + secret}),
                ("nobody cannot write", {"relay": "log = relay.log"}),
                ("nobody cannot write", {"relay": "log = secret"})]):
            options["relay"] = "user = nobody\n" + options.get("relay", "")
            self.found("error", text, **options)
        save(secret, PEMS["one.key"] + PEMS["one.pem"])
        self.found("warning", "nobody cannot read %s when it is renewed" % secret, relay="user = nobody",
                   bounces="[tls]\ncertificate = %s\nkey = %s" % (secret, secret))
        self.assertEqual(os.geteuid(), 0)

    def test_what_cannot_start_or_tells_too_much_is_said(self):
        free, port = shutil.disk_usage(self.folder).free, unused_port()
        for size, level in cases(self, [(free // 3, "ok"), (free * 2, "error")]):
            self.found(level, "/spool: ", min_free_space="%d" % size)
        self.found("error", "127.0.0.1:%d: Address already in use" % port,
                   listen="0.0.0.0:%d, 127.0.0.1:%d" % (port, port))
        with socket.create_server(("127.0.0.1", port)):
            self.found("error", "Address already in use", listen="127.0.0.1:%d" % port)
        for page, is_said in cases(self, [
                ("0.0.0.0:0", True), ("127.0.0.1:0", False), ("0.0.0.0:0\ntoken = x", False)]):
            _, findings = self.check(bounces="[status]\nlisten = " + page)
            self.assertEqual(any("set a token" in one["text"] for one in findings), is_said)
        for mode, domain, is_said in cases(self, [
                (0o644, "username = u\npassword = p", True), (0o640, "username = u\npassword = p", False),
                (0o644, "", False)]):
            os.chmod(self.path("etrn.conf"), mode)
            _, findings = self.check(domain=domain)
            self.assertEqual(any("everybody may read it" in one["text"] for one in findings), is_said)
        for kind in cases(self, ["overlay", "tmpfs"]):
            with mock.patch.object(etrn, "file_system", return_value=kind):
                self.found("warning", "spool is on " + kind)

    def test_a_port_of_the_running_relay_is_not_taken(self):
        port = unused_port()
        relay = self.relay(listen="127.0.0.1:%d" % port)
        self.assertEqual((relay.port, relay.run("--check")[0]), (port, 0))

    def test_it_ends_although_nobody_answers(self):
        done = threading.Event()
        self.addCleanup(done.set)
        hang = mock.patch.object(etrn.Resolver, "query", lambda *_: done.wait(2 * DEADLINE_S))
        with shorten(CHECK_S=0.3), hang:
            self.found("warning", "no answer in time")


# -- what nears its end

@contextlib.contextmanager
def idle_server(test, text="", domain=""):
    """A relay whose loop only the test turns, and that reaches no primary."""
    spool = etrn.Spool(os.path.join(test.folder, "spool"))
    spool.open()
    cfg = config("listen = 127.0.0.1:0\n" + text, domain)
    server = etrn.Server(cfg, spool, etrn.Log("stderr", "error", "x"))
    server.loop.in_thread = lambda work, then: then(etrn.Dialled(None, "refused"))
    try:
        yield server
    finally:
        server.queue.spool.may_write = False
        server.close()
        spool.close()


def make_certificate(test, name="backup.example.net", days=30):
    """A real one, self-signed: its file and its key's."""
    if not shutil.which("openssl"):
        test.skipTest("openssl is not installed")
    files = test.path(name + ".pem"), test.path(name + ".key")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days %d" % days
    subprocess.run([*command.split(), "-subj", "/CN=" + name, "-addext", "subjectAltName=DNS:" + name,
                    "-out", files[0], "-keyout", files[1]], check=True, stderr=subprocess.DEVNULL)
    return files


class Watchfulness(Folder):
    """What nears its end is told: the certificate, the disk.  And else the loop sleeps."""

    def swept(self, server, told, clock, seconds):
        """Texts of the alerts of a turn so much later."""
        told.reset_mock()
        server.loop.now, server.started = clock.advance(seconds), 0.0
        server._sweep()
        return ["%(event)s: %(text)s" % call[0][0] for call in told.call_args_list]

    def test_a_certificate_that_nobody_renews_is_told_once_a_day(self):
        files, clock = make_certificate(self, days=16), Clock()
        clock.wall = time.time()
        text = "min_free_space = 0\n[alerts]\nmail = a@b.example\n[tls]\ncertificate = %s\nkey = %s\n" % files
        with idle_server(self, text) as server, mock.patch.object(server.queue.alerts, "_mail") as told:
            server.certificate = server.load_certificate(server.cfg)
            for hours, expires in cases(self, [(1, ""), (48, "expires in 13d22h"), (12, ""),
                                               (336, "has expired"), (13, ""), (12, "has expired")]):
                self.assertEqual(self.swept(server, told, clock, 3600 * hours),
                                 ["certificate: the certificate %s %s" % (files[0], expires)] * bool(expires))
            with mock.patch.object(ssl, "_ssl", None):      # this Python cannot read dates
                self.assertEqual(etrn.read_certificate_end(files[0]), 0.0)
            make_certificate(self, days=90)    # no client asks for STARTTLS, and yet it is seen
            self.assertEqual(self.swept(server, told, clock, 86500), [])
            self.assertAlmostEqual(server.certificate.end, time.time() + 90 * 86400, delta=60)

    def test_a_disk_that_fills_is_noticed_though_no_mail_comes(self):
        clock, text = Clock(), "[alerts]\nmail = a@b.example\n"
        with idle_server(self, text) as server, mock.patch.object(server.queue.alerts, "_mail") as told, (
                mock.patch.object(server.spool, "free")) as free:
            for seconds, mebibytes, is_told in cases(self, [(2, 10 ** 6, 0), (2, 150, 1), (2, 140, 0),
                                                            (2, 10 ** 6, 0), (86500, 130, 1)]):
                free.return_value = mebibytes << 20
                self.assertEqual(self.swept(server, told, clock, seconds), [
                    "disk: %dM left for the spool; below 100M mail is refused" % mebibytes] * is_told)

    def test_an_idle_relay_and_one_in_a_long_outage_wake_once_a_second(self):
        for count, most in cases(self, [(0, 3610), (2, 4100)]):     # the primary is tried now and then
            clock, text = Clock(), "probe_interval = 1h\n[alerts]\nafter = 5m\n"
            clocks = dict(vars(time), monotonic=lambda: clock.mono, time=lambda: clock.wall)    # noqa: B023
            with shorten(time=types.SimpleNamespace(**clocks)), idle_server(
                    self, "min_free_space = 0\n", text) as server:
                server.started = clock.mono
                server.start()
                for number in range(count):
                    server.queue.accept(dict(sidecar_of("ABCDE%d" % number), received=clock.wall), 100)
                turns = 0
                while clock.mono < 4600 and turns < most:
                    turns += 1
                    clock.advance(max(0.0, server.loop.timers[0][0] - clock.mono))
                    server.loop.turn(0.0)
                    wait(lambda: not server.queue.spool.waiting or server.loop.turn(0.0))    # noqa: B023
                self.assertGreaterEqual(clock.mono, 4600)
                self.assertEqual([one.state for one in server.queue.destinations.all.values() if one.entries],
                                 [etrn.Primary.DOWN] * bool(count))


# -- what other programs read in the log

class LogReaders(Relays):
    """pflogsumm and fail2ban read our lines as Postfix's."""

    def read(self, *command):
        """What a program says of a log with an event of every kind."""
        name, path = program(command[0]), self.path("mail.log")
        answers = {"later": "450 4.2.0 Greylisted", "never": "550 5.1.1 (no) such, user"}
        primary = self.primary(RCPT=lambda argument: answers.get(argument[4:].partition("@")[0])).start()
        relay = self.relay(primary, domain="recovery_grace = 0s\nrecipients = any")
        for sender, people in (("one@x.example", "ab"), ("", ["later"]), ("", ["never"])):
            relay.send(sender=sender, recipients=["%s@%s" % (one, DOMAIN) for one in people])
        with relay.client() as wire:
            wire.say("MAIL FROM:<s@x.example>", "RCPT TO:<x@other.example>", "RCPT TO:<x%%y@%s>" % DOMAIN,
                     "RSET", "MAIL FROM:<s@x.example> SIZE=999999999", "ETRN " + DOMAIN, *["NONSENSE"] * 11)
        relay.send(b"Received: x\r\n" * 101 + b"\r\n")
        relay.logged("status=bounced")
        relay.logged("status=deferred .*Greylisted")
        primary.stop()
        relay.send(sender="one@x.example", recipients=["a@" + DOMAIN])
        relay.logged("to=<a@.* status=deferred .*Connection refused")
        self.assertEqual(relay.end(), 0)
        save(path, "\n".join(relay.log) + "\n")
        done = subprocess.run([name, *(path if word == "LOG" else word for word in command[1:])],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        self.assertEqual(done.returncode, 0, done.stdout)
        return done.stdout.decode("utf-8", "replace")

    def test_pflogsumm_counts_what_happened(self):
        # Two words: in one, --syslog-name=etrn_relay, it makes hyphens of the underscores.
        text = self.read("pflogsumm", "--syslog-name", "etrn_relay", "LOG")
        found = re.findall(r"(?m)^ +(\d+) +(received|delivered|deferred|bounced|rejected|recipients)", text)
        self.assertEqual({name: int(number) for number, name in found}, {
            "received": 4, "delivered": 2, "deferred": 2, "bounced": 1, "rejected": 4, "recipients": 2})
        for part in cases(self, ["4.2.0 Greylisted", "access denied (total: 2)", "5.1.1 (no) such, user"]):
            self.assertIn(part, text)

    def test_fail2ban_finds_the_address_to_ban(self):
        filter = "postfix[_daemon=etrn_relay/smtpd]"
        text = self.read("fail2ban-regex", "LOG", filter, "-v", "--print-all-matched")
        matched = re.findall(r"(?m)^\|  .*etrn_relay/smtpd\[\d+\]: (.*)$", text.partition("Matched line")[2])
        self.assertEqual([line.partition(";")[0].partition(" from ")[0] for line in matched],
                         ["NOQUEUE: reject: RCPT", "NOQUEUE: reject: RCPT", "too many errors after READY"])
        self.assertEqual(len(re.findall(r"(?m)^\| +127\.0\.0\.1 ", text)), 3)


def program(name):
    """The path of a real program; its test is skipped where there is none."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if path is None:
        raise unittest.SkipTest("no %s here" % name)
    return path


class Misuse(Relays):
    """Odd commands, odd terminals, odd owners."""

    def terminal(self, relay, line, answer=b""):
        """A command whose input and output are a terminal: exit status and what it showed."""
        master, slave = os.openpty()
        with os.fdopen(master, "rb", buffering=0) as screen:
            process = subprocess.Popen([*python(), "{}", "--config", relay.file, *line.split()],
                                       stdin=slave, stdout=slave, stderr=slave)
            os.close(slave)
            os.write(master, answer)
            shown = []
            with contextlib.suppress(OSError):              # Linux: EIO when the other side is closed
                shown.extend(iter(lambda: screen.read(4096), b""))
            return process.wait(DEADLINE_S), b"".join(shown).decode().replace("\r\n", "\n")

    def test_no_odd_command_starts_a_relay_or_does_anything(self):
        relay = Relay(self.folder)
        for line in cases(self, [
                "--flush ''", "--queue=", "--hold ''", "--show ''", "--config '' --queue", "--yes", "--raw",
                "--queue --yes", "--flush #queue", "--hold a\tb", "--delete all", "--bounce ALL", "--show",
                "--no-wait", "stray", "--status --queue", "--json", "--frobnicate", "--flush x --raw",
                "--stat", "--flush"]):
            with mock.patch.object(etrn, "serve", side_effect=AssertionError("a relay was started")):
                code, out, errors = relay.run(*(word.strip("'") for word in line.split(" ")))
            self.assertEqual((code, out, errors[:14], os.listdir(self.folder)), (
                64, "", "etrn_relay.py:", ["etrn.conf"]))
        for line in cases(self, [
                "--show nosuch", "--show ../../etc", "--show ABCDEF12", "--flush x.example", "--hold ABCDEF",
                "--queue abcdef12", "--flush @x.example", "--flush b\u00fccher.example", "--bounce ABCDEF12",
                "--export x.example", "--export @x.example", "--delete x.example", "--release x.example"]):
            code, out, errors = relay.run(*line.split())
            self.assertEqual((code, out, errors.count("\n")), (1, "", 1), errors)
        if not os.path.exists("/etc/etrn.conf"):
            environment = {key: value for key, value in os.environ.items() if key != "ETRN_RELAY_CONFIG"}
            done = subprocess.run([*python(), "{}", "--queue"], cwd=os.path.dirname(self.folder),
                                  env=environment, stderr=subprocess.PIPE)
            self.assertEqual(done.returncode, 78)
            self.assertIn(b"neither ./etrn.conf nor /etc/etrn.conf", done.stderr)

    def test_a_hold_of_subdomains_or_of_all_holds_the_first_mail_too(self):
        relay = self.relay(self.primary().start())
        for what in cases(self, ["@" + DOMAIN, "all", DOMAIN.upper()]):
            self.assertEqual(relay.run("--hold", what)[0], 0)       # before any mail has come
            relay.send()
            self.assertEqual([row["state"] for row in relay.queue()], ["held"])
            relay.run("--release", what)
            wait(lambda: relay.is_empty() and not relay.queue(), "an empty spool")

    def test_flush_draws_its_progress_on_a_terminal(self):
        primary = self.primary()
        relay = self.relay(primary)
        relay.send()
        relay.end()
        primary.start()
        code, shown = self.terminal(relay, "--flush all")           # without a relay
        self.assertEqual((code, shown.split("\r")[-1]), (
            0, "[%s] 1 of 1\nall: 1 delivered, 0 returned, 0 still waiting\n" % ("#" * 40)))

    def test_delete_all_asks_on_a_terminal_and_takes_an_answer_from_a_script(self):
        relay = self.relay()
        for _ in range(2):
            relay.send()
        relay.end()
        for answer, code in cases(self, [(b"", 64), (b"n\n", 0)]):
            done = relay.command("--delete all", input=answer)
            self.assertEqual((done.returncode, len(relay.queue())), (code, 2), done)
        code, shown = self.terminal(relay, "--delete all", b"\n")
        self.assertEqual((code, len(relay.queue())), (0, 2))
        self.assertIn("Really delete all queued mail?", shown)
        done = relay.command("--bounce " + relay.queue()[0]["id"])
        self.assertEqual(done.returncode, 0, done)                  # one message: nobody is asked
        done = relay.command("--delete all", input=b"y\n")
        self.assertEqual((done.returncode, relay.files()), (0, []))

    def test_mail_expires_without_a_daemon_too(self):
        """--flush from cron: three runs that failed after its time, and the last run's own try."""
        relay = Relay(self.folder, domain="lifetime = 1s")
        os.mkdir(relay.spool)
        for script, attempts in cases(self, [(None, 0), ({"RCPT": "450 4.2.0 greylisted"}, 0), ({}, 9)]):
            sidecar = sidecar_of("ABCDE0", received=time.time() - 5)
            sidecar["recipients"][0].update(attempts=attempts)
            write_files(relay.spool, pair(sidecar))
            primary = self.primary(**script or {})
            relay.write_config(primary=(primary if script is None else primary.start()).address)
            if script == {}:            # the primary is back: delivered, however late
                relay.run("--flush", DOMAIN)
                self.assertEqual(relay.files(), [])
                continue
            for run in range(1, 4):
                relay.run("--flush", DOMAIN)
                row, = relay.queue()        # in the end the notice
                self.assertEqual((run, row["sender"]), (run, "a@sender.example" if run < 3 else ""))
            self.assertEqual(relay.run("--delete", row["id"])[0], 0)

    def test_an_export_is_read_by_mailbox_and_names_the_recipients_of_its_domain_alone(self):
        relay = self.relay(domain="[domain two.example]\n")
        bodies = [b"", b"one\r\n", b"From here\r\n>From there\r\n\r\n\r\n", b"no end of line", b".\r\n..\r\n",
                  "From\u00e9\r\n".encode(), b"y" * 600000 + b"\r\nFrom end\r\n"]
        for body in bodies:
            relay.send(b"Subject: x\r\n\r\n" + body + (b"" if body.endswith(b"\n") or not body else b"\r\n"))
        people = ["u@" + DOMAIN, "v@two.example"]
        relay.send(sender="j\u00f6rg@sender.example", parameters=" SMTPUTF8", recipients=people)
        relay.end()
        with open(self.path("mbox"), "wb") as out:
            relay.command("--export " + DOMAIN, stdout=out, check=True)
        with contextlib.closing(mailbox.mbox(out.name)) as box:
            mails = [box.get_bytes(key).split(b"\n\n", 1)[1] for key in box.keys()]
            self.assertEqual(box[len(bodies)].get_from().split()[0], "j_rg@sender.example")
            self.assertEqual([one["X-Envelope-To"][:5] for one in box], ["<user"] * 7 + ["<u@ou"])
        for body, mail in zip(bodies, mails):
            back = re.sub(rb"(?m)^>(>*From )", rb"\1", mail).replace(b"\n", b"\r\n")
            self.assertEqual(back.rstrip(b"\r\n"), body.rstrip(b"\r\n"))
        text = relay.run("--export", "two.example")[1]
        self.assertEqual(re.findall("X-Envelope-To: <(.*)>", text), people[1:])
        if os.path.exists("/dev/full"):
            with open("/dev/full", "wb") as full:
                done = relay.command("--export all", stdout=full)
            self.assertEqual((done.returncode, done.stderr[:29]), (75, b"etrn_relay.py: No space left "))

    def test_neither_a_reader_that_leaves_nor_one_that_knows_only_ascii_is_an_error(self):
        relay = self.relay()
        data = b"Subject: x\r\n\r\n" + b"y" * 200000 + b"\r\n"
        relay.send(data, sender="j\u00f6rg@x.example", parameters=" SMTPUTF8")
        id, ascii = relay.queue()[0]["id"], {"env": dict(os.environ, PYTHONIOENCODING="ascii")}
        reader, writer = os.pipe()
        os.close(reader)
        self.addCleanup(os.close, writer)
        leaves = {"stdout": writer}
        for line, options in cases(self, [
                ("--export " + DOMAIN, leaves), ("--export " + DOMAIN, ascii),
                ("--show %s --raw" % id, leaves), ("--show " + id, ascii),
                ("--queue", ascii), ("--queue --json", leaves), ("--help", leaves)]):
            done = relay.command(line, **options)
            self.assertEqual((done.returncode, done.stderr), (0, b""))

    @unittest.skipUnless(os.geteuid() == 0, "needs root, to become another account")
    def test_an_account_owns_all_of_its_spool_whoever_commands(self):
        os.chmod(self.folder, 0o755)
        with Relay(self.folder, self.primary().address, relay="user = nobody") as relay:
            relay.send()
            relay.logged(": down: ")
            status, nobody = load("/proc/%d/status" % relay.process.pid), pwd.getpwnam("nobody")
            self.assertEqual(re.findall(r"(?m)^[UG]id:\s+(\d+)\s+(\d+)\s+(\d+)\s+(\d+)$", status), [
                (str(id),) * 4 for id in (nobody.pw_uid, nobody.pw_gid)])       # root is given up for good
            self.assertEqual((relay.end(), relay.run("--hold", "all")[0]), (0, 0))      # by root, offline
        owners = {os.stat(os.path.join(folder, name)).st_uid
                  for folder, _, files in os.walk(relay.spool) for name in [".", *files]}
        self.assertEqual((owners, os.geteuid(), os.getegid()), ({nobody.pw_uid}, 0, 0))
        os.chown(relay.spool, 0, 0)
        for user, why in cases(self, [("nosuch", b"there is no such account"),
                                      ("nobody", b"that account cannot write the spool")]):
            relay.write_config(relay="user = " + user)
            done = relay.command("")
            self.assertEqual((done.returncode, why in done.stderr), (78, True), done.stderr)

    def test_what_the_configuration_names_must_be_there_before_a_port_is_bound(self):
        for lines in cases(self, [{"relay": "log = missing/relay.log"}, {"relay": "spool = etrn.conf"},
                                  {"domain": "recipients = file:missing"},
                                  {"bounces": "username = u\npassword = file:missing"},
                                  {"domain": "[tls]\ncertificate = missing\nkey = missing"}]):
            relay = Relay(self.inner(), **lines)
            with mock.patch.object(etrn.Server, "listen", side_effect=AssertionError("a port was bound")):
                code, _, errors = relay.run()
            self.assertEqual((code, errors.count("\n")), (78, 1), errors)


class Outage(Relays):
    """The main job, with programs that are not ours."""

    def test_the_demonstration_works_and_leaves_nothing(self):
        done = subprocess.run(
            [sys.executable, "-S", SOURCE, "--demo"], cwd=self.folder,
            env=dict(os.environ, TMPDIR=self.folder), capture_output=True)
        self.assertEqual((done.returncode, done.stderr, os.listdir(self.folder)), (0, b"", []))
        # The relay may find the primary just before that asks.
        reply = rb"25[03] 2\.0\.0 OK, ([1-5] pending|queuing)"
        for text in (b"sender4@example.org", reply, b"Nothing was lost"):
            self.assertRegex(done.stdout, text)

    def test_a_demonstration_that_is_ended_leaves_nothing(self):
        for number in cases(self, [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]):
            process = subprocess.Popen([sys.executable, "-S", SOURCE, "--demo"], stdout=subprocess.PIPE,
                                       env=dict(os.environ, TMPDIR=self.folder), stderr=subprocess.DEVNULL)
            with process:
                wait(lambda: any("control" in names for _, _, names in os.walk(self.folder)), "a relay")
                process.send_signal(number)
                process.communicate(timeout=DEADLINE_S)         # until the last of them has ended
            self.assertEqual((process.returncode, os.listdir(self.folder)), (130, []))

    def test_the_sample_runs_as_it_is_and_small(self):
        """From a fresh folder, as a script; but its two ports are ones that are free here."""
        primary, own = self.primary(), self.primary()
        text = load(SAMPLE).replace("127.0.0.1:2525", own.address)
        save(self.path("etrn.conf.sample"), text.replace("127.0.0.1:2526", primary.address))
        shutil.copy(SOURCE, self.folder)
        own.sock.close()
        command = [sys.executable, "etrn_relay.py", "--config", "etrn.conf.sample"]
        measure = "import os, sys; id = os.spawnv(1, sys.argv[1], sys.argv[1:]); print(os.wait4(id, 0)[2][2])"
        with open(self.path("log"), "w+", encoding="utf-8") as log:
            process = subprocess.Popen(command, cwd=self.folder, stderr=log)
            self.addCleanup(process.wait)
            self.addCleanup(process.kill)
            wait(lambda: log.seek(0) or "started: " in log.read(), "the relay")
            if "glibc" in platform.libc_ver()[0]:       # which can be asked to give back what is free
                # 3.12 alone keeps the file's syntax tree to the end
                limit_mb = 45 if sys.version_info[:2] == (3, 12) else 25
                size, = re.findall(r"(?m)^Pss: +(\d+) kB", load("/proc/%d/smaps_rollup" % process.pid))
                self.assertLess(int(size), limit_mb << 10)
                done = subprocess.run([sys.executable, "-c", measure, *command, "--queue"], cwd=self.folder,
                                      stdout=subprocess.PIPE, check=True)
                # 40 MB is the goal: Python reads the whole file first, which takes a file of 330 KB
                self.assertLess(int(done.stdout.split()[-1]), 56 << 10)
            with contextlib.closing(Wire(own.port)) as client:
                client.say("EHLO x")
                self.assertEqual(client.send(MESSAGE, recipients=["user@example.com"])[:3], "250")
            primary.start()
            wait(lambda: primary.messages, "the mail")
            process.terminate()
            self.assertEqual(process.wait(DEADLINE_S), 0)
        self.assertEqual(set(os.listdir(self.folder)), {"etrn.conf.sample", "etrn_relay.py", "log", "spool"})


class Machines(Relays):
    """Machines and people as they are."""

    def test_standard_files_that_are_closed_become_dev_null_and_a_rotated_log_is_opened_anew(self):
        primary = self.primary()
        for closed in cases(self, ["1", "012"]):
            relay = Relay(self.inner(), primary.address, relay="log = relay.log")
            closing = "".join(" %s>&-" % fd for fd in closed)
            command = ["sh", "-c", 'exec "$0" "$@"' + closing, sys.executable, SOURCE, "--config", relay.file]
            relay.process, relay.reader = subprocess.Popen(command), threading.current_thread()
            self.addCleanup(relay.process.kill)

            def logged(pattern, name="relay.log", relay=relay):
                with contextlib.suppress(FileNotFoundError):
                    return re.search(pattern, load(os.path.join(relay.folder, name)))
            relay.port = int(wait(lambda: logged(r"listening on 127\.0\.0\.1:(\d+)")).group(1))
            for fd in closed:
                self.assertEqual(os.readlink("/proc/%d/fd/%s" % (relay.process.pid, fd)), "/dev/null")
            self.assertEqual(relay.send()[:3], "250")
            done = subprocess.run([*command, "--queue"], capture_output=True)
            self.assertEqual((done.returncode, done.stderr), (0, b""))
            self.assertEqual(b"ourdom" in done.stdout, "1" not in closed)
            os.rename(os.path.join(relay.folder, "relay.log"), os.path.join(relay.folder, "old"))
            relay.signal(signal.SIGHUP)
            wait(lambda: logged("configuration reread"))
            relay.process.terminate()
            self.assertEqual((relay.process.wait(DEADLINE_S), logged("reread", "old")), (0, None))
            self.assertTrue(logged("stopped"))

    def test_a_service_manager_hears_that_it_is_ready_and_that_it_lives(self):
        abstract = ["\0etrn-%d" % os.getpid()] * (sys.platform == "linux")
        for address in cases(self, [self.path("notify"), *abstract]):
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
                manager.settimeout(DEADLINE_S)
                manager.bind(address)
                with mock.patch.dict(os.environ, NOTIFY_SOCKET=address.replace("\0", "@")):
                    relay = self.relay(WATCHDOG_S=0.05)
                self.assertEqual([manager.recv(99) for _ in range(4)], [b"READY=1"] + [b"WATCHDOG=1"] * 3)
            self.assertEqual((relay.send()[:3], relay.end()), ("250", 0))       # it has gone: no matter

    def test_an_address_that_is_not_there_yet_may_come_and_one_that_is_taken_may_be_left(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            busy = "127.0.0.1:%d" % taken.getsockname()[1]
            first = "listen = 127.0.0.1:0\n"
            for where, option in cases(self, itertools.product(
                    ["203.0.113.9:0", "[2001:db8::9]:0", busy],
                    ["listen = ", first + "odmr_listen = ", first + "[status]\nlisten = "])):
                why = "already in use" if where == busy else "Cannot assign"
                file = os.path.join(self.inner(), "etrn.conf")
                save(file, "[relay]\n%s%s\n[domain %s]\n" % (option, where, DOMAIN))
                code, _, errors = run("--config", file)
                self.assertRegex(errors, r"\Aetrn_relay.py: cannot listen on \S+: [^\n]*%s[^\n]*\n\Z" % why)
                self.assertEqual(code, 75)

    def test_readers_share_the_lock_and_a_relay_waits_for_a_command_but_not_for_a_relay(self):
        relay = self.relay()
        other = Relay(relay.folder)
        code, _, errors = other.run()
        self.assertEqual(code, 75)
        self.assertRegex(errors, r"spool is in use by process %d\n\Z" % relay.process.pid)
        for _ in range(3):
            relay.send()
        relay.end()
        spool = etrn.Spool(relay.spool)
        spool.open(is_relay=False)
        with shorten(LOCK_WAIT_S=0.1, RELAY_START_S=0.1):
            codes = [relay.run(*line.split())[0] for line in ("--status", "--queue", "--hold all")]
        self.assertEqual(codes, [75] * 3)
        threading.Timer(0.5, spool.close).start()
        relay.start()                                           # it waits
        self.assertEqual((len(relay.queue()), relay.end()), (3, 0))

    def helper(self, relay):
        """The process ID of a relay's spool."""
        path = "/proc/%d/task/%d/children" % (relay.process.pid, relay.process.pid)
        if not os.path.exists(path):
            self.skipTest("no /proc that tells of children")
        return int(load(path).split()[0])

    def test_a_relay_ends_without_its_spool_and_a_spool_without_its_relay_when_its_work_is_done(self):
        relay = self.relay()
        relay.send()
        helper = self.helper(relay)
        os.kill(helper, signal.SIGKILL)
        self.assertEqual(relay.process.wait(DEADLINE_S), -signal.SIGKILL)       # no less than a crash
        relay.logged("error: the spool's process has ended: wait status 9")
        relay.start()
        relay.send()
        helper = self.helper(relay)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            os.kill(helper, number)                 # they are the relay's
        os.kill(helper, signal.SIGSTOP)
        with relay.client() as client:
            client.say("MAIL FROM:<a@b.example>", "RCPT TO:<u@%s>" % DOMAIN, "DATA")
            since = len(relay.log)
            client.raw(b"x\r\n.\r\n")
            relay.logged("client=", since)
            relay.json("--status")                  # the loop's next turn: the message was passed on
            relay.signal(signal.SIGKILL)
            relay.process.wait()
        threading.Timer(0.3, os.kill, (helper, signal.SIGCONT)).start()
        relay.start()                               # it waits
        self.assertEqual((len(relay.queue()), relay.end()), (3, 0))

    def test_the_spool_has_no_socket_of_the_relay_and_says_why_it_cannot_start(self):
        relay = self.relay(begin="import os; os.listdir = lambda path, real=os.listdir: "
                                 "['0', '1', '2'] if path == '/dev/fd' else real(path); ")  # as on FreeBSD
        path = "/proc/%d/fd" % self.helper(relay)
        wait(lambda: len(os.listdir(path)) == 7, "the relay's descriptors to be closed")
        self.assertEqual(relay.end(), 0)
        relay.begin = "import threading; threading.Thread.start = None; "
        done = relay.command("--queue")
        self.assertEqual((done.returncode, b"Traceback" in done.stderr), (75, True))

    def test_a_hole_between_relay_and_spool_ends_both(self):
        class Full(socket.socket):
            def send(self, *_):
                raise OSError(errno.ENOBUFS, "no memory")
            sendall = send
        loop = etrn.Loop(self.fail)
        self.addCleanup(loop.close)
        one, other = socket.socketpair()
        with one, other:
            stream = etrn.Stream(loop, Full(fileno=one.detach()), self.fail, self.fail)
            other.settimeout(DEADLINE_S)
            stream.send(b"question")
            self.assertEqual(other.recv(9), b"")
            stream.close()
        one, other = socket.socketpair()
        with other, Full(fileno=one.detach()) as full:
            other.sendall(etrn.pack([(1, "heal", ())]))
            other.shutdown(socket.SHUT_WR)
            self.assertRaises(OSError, etrn.serve_spool, mock.Mock(heal=bool), full, 1)

    def test_the_spool_has_descriptors_for_more_connections_than_at_its_start(self):
        few = "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (256, r.getrlimit(r.RLIMIT_NOFILE)[1])); "
        relay = self.relay(begin=few, relay="max_connections = 10")
        path = "/proc/%d/limits" % self.helper(relay)
        wait(lambda: re.search(r"open files +(\d+) +\1 ", load(path)), "a limit as high as may be")
        self.assertEqual(relay.end(), 0)

    def test_who_started_the_relay_may_have_ignored_the_end_of_children(self):
        command = [sys.executable, SOURCE, "--config", Relay(self.folder).file, "--queue"]
        ignore = functools.partial(signal.signal, signal.SIGCHLD, signal.SIG_IGN)
        done = subprocess.run(command, preexec_fn=ignore, capture_output=True)
        self.assertEqual((done.returncode, done.stderr), (0, b""))

    def test_a_primary_that_moves_gets_its_mail_and_the_one_before_ends_what_it_is_at(self):
        done = threading.Event()
        before = self.primary(**{".": lambda _: done.wait(DEADLINE_S) and "250 2.0.0 taken"}).start()
        after = self.primary().start()
        relay = self.relay(before)
        for _ in range(3):
            relay.send()
        wait(lambda: "DATA" in before.log, "the first message at its end")
        self.reload(relay, "configuration reread", primary=after.address)
        wait(lambda: len(after.messages) == 2, "the others at the new primary")
        threading.Timer(0.5, done.set).start()
        self.assertEqual((relay.end(), relay.files()), (0, []))         # the stop waits for an answer
        self.assertEqual((len(before.messages), len(after.messages)), (1, 2))

    def test_what_no_connection_has_yet_is_held_and_a_flush_ends_when_it_is_to_be_collected(self):
        for change in cases(self, ["hold", "atrn"]):
            done, primary = threading.Event(), self.primary().start()
            relay = self.relay(primary, domain="connections = 1", TRIGGER_S=DEADLINE_S)
            relay.send()
            relay.until_empty()             # it has proven itself: others are read ahead
            primary.script["."] = lambda _, done=done: done.wait(DEADLINE_S) and "250 2.0.0 taken"
            for _ in range(4):
                relay.send()
            wait(lambda primary=primary: primary.log.count("DATA") == 2, "one message at its end")
            codes = []

            def flush(relay=relay, codes=codes):
                codes.extend(relay.run("--flush", DOMAIN)[0] for _ in range(2))
            if change == "hold":
                self.assertEqual(relay.run("--hold", DOMAIN)[0], 0)
            else:
                threading.Thread(target=flush, daemon=True).start()
                relay.logged("command: site=")
                self.reload(relay, "configuration reread", primary="atrn")
            done.set()
            wait(lambda relay=relay: len(relay.queue()) == 3)
            if change == "hold":
                self.assertEqual({row["state"] for row in relay.queue()}, {"held"})
            else:
                wait(lambda codes=codes: codes == [75, 75], "the flushes to end")
            relay.end()
            self.assertEqual(len(primary.messages), 2)

    def test_who_says_too_much_at_its_greeting_is_down(self):
        relay = self.relay(self.primary(EHLO=b"250 x\r\n250 junk\r\n").start())
        relay.send()
        relay.logged(": down: .*not asked for")
        for _ in range(5):
            one = relay.json("--status")["domains"][DOMAIN]
            self.assertEqual((one["primary"], "not asked for" in one["last_error"]), ("down", True))

    def test_a_domain_that_found_no_place_for_a_connection_gets_one(self):
        one, two = self.primary().start(), self.primary().start()
        relay = self.relay(one, domain="[domain two.example]\nprimary = " + two.address, OUTBOUND_MAX=1,
                           IDLE_CONNECTION_S=0.1)
        relay.send()
        relay.send(recipients=["u@two.example"])
        relay.until_empty()
        self.assertEqual((len(one.messages), len(two.messages)), (1, 1))

    def test_a_command_waits_for_a_relay_that_has_only_begun_and_is_told_when_it_breaks_off(self):
        relay = self.relay()
        relay.end()
        for answer, code in cases(self, [(b'{"count":0,"exit":0}\n', 0), (b'{"count"', 69), (b"", 69)]):
            with contextlib.closing(etrn.Spool(relay.spool)) as spool, socket.socket(socket.AF_UNIX) as sock:
                spool.open()

                def begin(answer=answer, sock=sock):
                    sock.bind(relay.at("control"))
                    sock.listen(1)
                    client, _ = sock.accept()
                    client.recv(999)
                    client.sendall(answer)
                    client.close()
                timer = threading.Timer(0.2, begin)
                timer.start()
                self.assertEqual(relay.run("--hold", "all")[0], code)
                timer.join()
                os.unlink(relay.at("control"))

    def test_a_flush_without_a_relay_delivers_and_a_control_socket_comes_back(self):
        primary = self.primary()
        relay = self.relay(primary, SWEEP_S=0.05)
        relay.send()
        path = relay.at("control")
        os.unlink(path)                 # by somebody who tidies up
        wait(lambda: os.path.exists(path), "the control socket")
        self.assertEqual(relay.json("--status")["pid"], relay.process.pid)
        os.rename(relay.spool, relay.spool + ".gone")
        relay.logged("no control socket, commands will not work: ")
        time.sleep(0.5)                 # it is tried at each sweep, and said once
        self.assertEqual(sum("no control socket" in line for line in relay.log), 1)
        os.rename(relay.spool + ".gone", relay.spool)
        wait(lambda: os.path.exists(path), "the control socket")
        relay.end()
        primary.start()
        code, out, errors = relay.run("--flush", DOMAIN, "--no-wait")       # nobody would deliver later
        self.assertEqual((code, out, len(primary.messages), relay.files(), "no relay runs" in errors), (
            0, DOMAIN + ": 1 delivered, 0 returned, 0 still waiting\n", 1, [], True))


# == 14. LAYERS ================================================================
# The file's own rules, read from its source.

class Source:
    """A text of the file under test.  Each rule finds what breaks it: (line, what)."""
    PURE = {"GRAMMAR", "CONFIG", "SESSION", "SCHEDULE", "DSN", "STATUS"}
    IMPURE = set("socket select selectors random secrets threading queue smtplib tempfile subprocess ssl "
                 "open print input exec eval __import__ globals".split())
    HARMLESS = {"os": {"path"}, "time": {"strftime", "gmtime", "localtime", "asctime"},
                "os.path": {"join", "dirname", "basename", "abspath"}}
    WAITING = {"threading.Thread": {"LOOP", "SPOOL", "MAIN"}, "time.sleep": {"SPOOL", "MAIN"},
               "os.fsync": {"SPOOL"}, "os.rename": {"SPOOL"}, "os.unlink": {"SPOOL"}, "os.fork": {"SPOOL"}}
    WRITERS = set("append commit record remove shift save set_aside convert discard heal".split())

    def __init__(self, text):
        self.text, self.tree = text, ast.parse(text)
        self.banners = [(number, int(match.group(1)), match.group(2)) for number, match in enumerate(
            (re.match(r"# == (\d+)\. ([A-Z]+) =+$", line) for line in text.split("\n")), 1) if match]
        self.nodes = [(node, *self.section(node)) for node in ast.walk(self.tree) if hasattr(node, "lineno")]

    def section(self, node):
        at = bisect.bisect(self.banners, (node.lineno + 1,))
        return self.banners[at - 1][1:] if at else (0, "")

    def defined(self):
        """Each module-level name and its statement, the last one first."""
        for node in reversed(self.tree.body):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield node.name, node
            for target in getattr(node, "targets", [getattr(node, "target", None)]):
                names = [one for one in ast.walk(target or ast.Pass()) if isinstance(one, ast.Name)]
                yield from ((one.id, node) for one in names)

    def forward(self):
        """A section names what a later one defines."""
        defined = {name: self.section(node)[0] for name, node in self.defined()}
        return ((node.lineno, node.id) for node, number, _ in self.nodes
                if isinstance(node, ast.Name) and defined.get(node.id, 0) > number)

    def impurities(self):
        """A pure section touches a socket, a file, a clock or chance, or names what does."""
        impure = self.IMPURE | {name for name, node in self.defined() if isinstance(
            node, (ast.FunctionDef, ast.ClassDef)) and self.section(node)[1] not in self.PURE} - {"Now"}
        for node, _, name in self.nodes:
            if name in self.PURE:
                if isinstance(node, ast.Name) and node.id in impure:
                    yield node.lineno, node.id
                if isinstance(node, ast.Attribute) and (
                        node.attr not in self.HARMLESS.get(path_of(node.value), {node.attr})):
                    yield node.lineno, path_of(node)

    def waits(self):
        """State is touched in the loop alone, and the loop never waits: no lock, and what waits elsewhere."""
        for node, _, name in self.nodes:
            path = path_of(node)
            if name not in self.WAITING.get(path, set() if path.startswith("threading.") else {name}):
                yield node.lineno, path

    def closures(self):
        """What crosses to the spool is data, with the name of one of its methods, and it is told to write by
        ask() alone.  What a thread does sees nothing of `self`."""
        methods = {getattr(node, "name", "") for node, _, name in self.nodes if name == "SPOOL"}
        for node, _, name in self.nodes:
            path = path_of(node.func) if isinstance(node, ast.Call) else ""
            asked = []           # the method's name, and values for it
            if path.endswith("spool.ask"):
                asked = node.args[1:]
            elif path.endswith("recorder.ask"):
                asked = node.args
            elif name == "QUEUE" and isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple):
                asked = node.value.elts
            elif name == "QUEUE" and isinstance(node, ast.Yield) and node.value is not None and (
                    any(path_of(one) == "self" for one in ast.walk(node.value))):
                yield node.lineno, "a thread that sees state"
            if asked and not isinstance(asked[0], ast.Starred) and path_of(asked[0]) != "what":
                if getattr(asked[0], "value", None) not in methods:
                    yield node.lineno, "no method of Spool"
                if "self" in map(path_of, asked[1:]) or any(
                        isinstance(one, ast.Lambda) or path_of(one) == "functools.partial"
                        for value in asked[1:] for one in ast.walk(value)):
                    yield node.lineno, "no data"
            elif path.endswith("in_thread") and any(path_of(one) == "self" for one in ast.walk(node.args[0])):
                yield node.lineno, "a thread that sees state"
            elif "spool." in path and name != "SPOOL" and path.rpartition(".")[2] in self.WRITERS:
                yield node.lineno, path

    def imports(self):
        """Not at the top, or not used.  Each start shows that all is of the standard library: python()."""
        used = {node.id for node, _, _ in self.nodes if isinstance(node, ast.Name)} | {"annotations"}
        for node, number, _ in self.nodes:
            for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
                if number > 1 or (alias.asname or alias.name).partition(".")[0] not in used:
                    yield node.lineno, alias.name

    def sizes(self):
        """What a reader can hold in the head, and what a terminal shows."""
        lines = enumerate(self.text.split("\n"), 1)
        yield from ((number, "%d columns" % len(line)) for number, line in lines if len(line) > 110)
        for name, node in self.defined():
            last = max(getattr(one, "lineno", 0) for one in ast.walk(node))
            if isinstance(node, ast.ClassDef) and last - node.lineno >= 450:
                yield node.lineno, "class " + name


class Layers(unittest.TestCase):
    """Sections point backward, pure ones touch nothing, and the three rules of the LOOP's banner hold."""
    VIOLATIONS = {    # what finds them: (section, a line more in it)
        "forward": [("GRAMMAR", "parse_config('')"), ("SPOOL", "Queue"), ("SESSION", "x = Destinations"),
                    ("QUEUE", "x: Server = None"), ("SERVER", "main")],
        "impurities": [(section, line) for section in sorted(Source.PURE) for line in (
            "os.unlink('x')", "os.path.exists('x')", "time.time()", "open('x')", "random.random()",
            "print(1)", "socket.socket()", "x = time.monotonic", "secrets.token_hex()", "__import__('os')",
            "x = Loop", "ssl.SSLContext()", "subprocess.run([])", "Spool('x')", "Log('x', 'y', 'z')")],
        "waits": [("QUEUE", "threading.Lock()"), ("SPOOL", "x = threading.Event()"), ("QUEUE", "os.fork()"),
                  ("SERVER", "threading.Thread()"), ("DELIVERY", "time.sleep(1)"), ("SERVER", "os.fsync(1)"),
                  ("QUEUE", "os.unlink('x')")],
        "closures": [("QUEUE", line) for line in (
            "self.spool.ask(f, 'remov', id)", "self.spool.ask(f, 'remove', lambda: 1)", "spool.commit([])",
            "self.spool.ask(f, 'save', functools.partial(f))", "self.queue.spool.remove([id])",
            "spool.ask(f, 'record', self)", "x.in_thread(lambda: self.x, f)", "x.in_thread(self.work, f)",
            "yield 'remov', id", "yield 'remove', lambda: 1", "yield lambda: self.x",
            "x.recorder.ask('remov', id)")],
        "imports": [("SPOOL", "import shutil"), ("QUEUE", "from os import unlink"), ("SERVER", "import json"),
                    ("MAIN", "import asyncio")],
        "sizes": [("QUEUE", "x = '%s'" % ("y" * 110))]}

    def test_every_rule_is_kept(self):
        source = Source(load(SOURCE))
        for rule in cases(self, self.VIOLATIONS):
            self.assertEqual(list(getattr(source, rule)()), [])

    def test_each_violation_is_noticed(self):
        """These tests see what they look for."""
        kept = Source(load(SOURCE))
        for rule, rows in cases(self, self.VIOLATIONS.items()):
            text = kept.text
            for section, line in rows:          # as the first line of that section's first function
                function = re.compile(r"\n(?:    )*def [^\n]*:\n( *)")
                match = function.search(text, text.index(". %s ==" % section))
                text = text[:match.end()] + line + "    # bad\n" + match.group(1) + text[match.end():]
            known = {what for _, what in getattr(kept, rule)()}
            found = {line for line, what in getattr(Source(text), rule)() if what not in known}
            self.assertEqual(found, {number for number, line in enumerate(text.split("\n"), 1)
                                     if line.endswith("    # bad")})

    def test_sections_are_numbered_in_order_and_listed_in_the_manual(self):
        contents = re.findall(r"(\d+) ([A-Z]+)", (etrn.__doc__ or "").partition("\nCONTENTS\n")[2])
        banners = Source(load(SOURCE)).banners
        self.assertEqual(contents, [(str(number), name) for _, number, name in banners])
        self.assertEqual([number for _, number, _ in banners], list(range(1, 18)))

    def test_the_oldest_python_promised_can_read_the_source(self):
        for path in cases(self, [SOURCE, os.path.abspath(__file__)]):
            ast.parse(load(path), feature_version=(3, 8))

    def test_importing_has_no_effect(self):
        code = ("import signal, sys, threading, os\n"
                "def world(): return (*map(signal.getsignal, (1, 10, 15)), os.listdir('.'), os.getcwd(),\n"
                "                     dict(os.environ), os.listdir('/proc/self/fd'), os.umask(0o77))\n"
                "world(); before = world(); sys.path.insert(0, %r); import etrn_relay\n"
                "print(before == world(), threading.active_count())" % HERE)
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([sys.executable, "-B", "-c", code], cwd=folder, capture_output=True)
        self.assertEqual((done.stdout.decode().split(), done.stderr), (["True", "1"], b""))


def path_of(node):
    """`a.b.c` of names and attributes; of anything else nothing."""
    before = path_of(node.value) if isinstance(node, ast.Attribute) else ""
    return before and "%s.%s" % (before, node.attr) if before else getattr(node, "id", "")


# -- the real thing

class Taker(Primary):
    """A primary that knows which connection brought what, and how that ended."""

    def __init__(self, **script):
        super().__init__(**script)
        self.copies = []       # (connection, mark), answered or not
        self.quits = set()                    # connections that ended in good order

    def on_data(self, sock, data):
        self.copies.append((sock, mark_of(data)))

    def _say(self, sock, verb, *rest):
        if verb == "QUIT":
            self.quits.add(sock)
        return super()._say(sock, verb, *rest)


def mark_of(data):
    return re.findall(rb"(?m)^Subject: (\S+)", data)[0]


def marked(mark):
    """A message of any size, some larger than what is read at once, with lines that begin with dots."""
    chance = random.Random(mark)
    lines = bytes(chance.choices(range(32, 256), k=70)) + b"\r\n.\r\n..x\r\n"
    return b"Subject: %s\r\n\r\n%s" % (mark, lines * int(2 ** chance.uniform(0, 12.5)))


class Senders:
    """Clients that send as fast as they can, come back after every failure, and note each 250 in a ledger."""

    def __init__(self, relay, pause_s=0.0, people=("user",)):
        self.relay, self.recipients, self.pause_s = relay, [one + "@" + DOMAIN for one in people], pause_s
        self.ledger = []
        self.is_over = threading.Event()
        self.threads = [threading.Thread(target=self._run, args=(one,), daemon=True) for one in range(6)]
        for thread in self.threads:
            thread.start()

    def _run(self, number):
        counter = itertools.count()
        while not self.is_over.wait(0.02):
            with contextlib.suppress(OSError, IndexError, ValueError), self.relay.client() as client:
                reply = "4"
                while reply[:3] in ("250", "451", "452") or reply == "4":
                    if self.is_over.wait(self.pause_s):
                        return
                    mark = b"%d-%d" % (number, next(counter))
                    reply = client.send(marked(mark), recipients=self.recipients)
                    self.ledger += [mark] * (reply[:3] == "250")

    def stop(self):
        self.is_over.set()
        for thread in self.threads:
            thread.join(DEADLINE_S)
        return self.ledger


class Ledgers(Relays):
    """Tests that compare what arrived with each 250."""

    def compare(self, primary, relay, ledger):
        """Every 250 was delivered, intact."""
        if not primary.is_up:
            primary.start()
        wait(relay.is_empty, "an empty spool", 3 * DEADLINE_S)
        found = {mark_of(data) for _, _, data in primary.messages}
        self.assertEqual([mark for mark in ledger if mark not in found], [])
        for _, _, data in primary.messages:
            self.assertEqual(without_received(data), marked(mark_of(data)))
        self.assertEqual(os.listdir(relay.at("corrupt")), [])


def open_files(relay):
    return len(os.listdir("/proc/%d/fd" % relay.process.pid))


class Storms(Ledgers):
    """Relay and primary die at random, under load, for a while."""
    RELAY = "max_connections_per_client = 0"

    def storm(self, seed, seconds, relay_dies):
        self.row, chance, primary = seed, random.Random(seed), self.primary(Taker)
        relay = self.relay(primary.start(), relay=self.RELAY)
        deaths, samples, files = [], [], open_files(relay)
        senders, end = Senders(relay, 0.01), time.monotonic() + seconds
        while time.monotonic() < end or ((len(deaths) < 2 or len(senders.ledger) <= 20)
                                         and time.monotonic() < end + 3 * DEADLINE_S):
            time.sleep(chance.uniform(0.05, 0.6))       # the storm's own time: how long each calm lasts
            if relay_dies and chance.random() < 0.6:
                deaths.append("relay")
                relay.end(signal.SIGKILL)
                relay.start()
            elif primary.is_up:
                deaths.append("primary")
                primary.stop()
            else:
                primary.start()
            samples.append(memory_mb(relay))
        ledger = senders.stop()
        self.compare(primary, relay, ledger)
        self.assertGreater(len(ledger), 20)
        self.assertGreater(len(deaths), 1)
        broken = collections.Counter()
        last = {mark: number for number, (_, mark) in enumerate(primary.copies)}
        for number, (connection, mark) in enumerate(primary.copies):
            if number != last[mark]:                    # another copy came later: this answer was not heard
                self.assertNotIn(connection, primary.quits, "sent twice although its connection ended well")
                broken[connection] += 1
        if not relay_dies:                              # then at most the one that was being answered
            self.assertLessEqual(max(broken.values(), default=0), 1)
            wait(lambda: open_files(relay) <= files + 8, "descriptors to be closed")
            quarter = len(samples) // 4
            if quarter > 5:
                self.assertLess(max(samples[-quarter:]), max(samples[quarter:2 * quarter]) * 1.25 + 4)
        print("storm %d: %d acknowledged, %d copies too many, deaths: %s" % (
            seed, len(ledger), sum(broken.values()), collections.Counter(deaths)), file=sys.stderr)

    def test_a_primary_that_dies_gets_at_most_one_copy_too_many_for_each_connection(self):
        self.storm(1, 1.5, False)

    def test_a_storm_of_kills_loses_nothing(self):
        self.storm(2, 2.0, True)

    @long_run
    def test_long_storms_lose_nothing_and_leave_memory_and_descriptors_as_they_were(self):
        for seed in range(10, 14):
            self.storm(seed, 40.0 if seed % 2 else 15.0, seed % 2 == 0)


class Sickness(Relays):
    """A disk that fails under a running relay, and is well again."""

    def test_every_failing_disk_is_answered_4xx_and_outlived(self):
        for fault in cases(self, [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE,
                                  errno.EMFILE]):
            primary, shim = self.primary(), types.SimpleNamespace(**vars(os))
            fails = mmap.mmap(-1, 1)            # what is set here the spool's process sees, too

            def call(name, *given, fault=fault, fails=fails, **options):
                is_meant = name != "open" or fault == errno.EMFILE or given[1] & os.O_CREAT
                if is_meant and fails[0]:
                    raise OSError(fault, os.strerror(fault))
                return getattr(os, name)(*given, **options)
            names = "open write fsync rename unlink ftruncate link".split()
            for name in names[:1] if fault == errno.EMFILE else names:
                setattr(shim, name, functools.partial(call, name))
            domain = "[domain two.example]\nprimary = %s\nrecipients = any\ncutthrough = no\n"
            with shorten(RETRY_DISK_S=0.1, SWEEP_S=0.05, PROBE_FIRST_S=0.05, os=shim), Local(
                    self.inner(), domain=domain % primary.address) as local, (
                    Wire(local.port)) as client:
                client.say("EHLO client.example")
                self.assertEqual(client.send(marked(b"first"), recipients=["x@two.example"])[:3], "250")
                fails[0] = True
                expected = "452 4.3.1" if fault in (errno.ENOSPC, errno.EDQUOT) else "451 4.3.0"
                for data in (MESSAGE, b"x" * 600000 + b"\r\n", MESSAGE):
                    self.assertEqual(client.send(data)[:9], expected)
                self.assertEqual(bool(local.server.queue.spool.sick),
                                 fault in (errno.EIO, errno.EROFS, errno.ESTALE))
                primary.start()
                if fault != errno.EMFILE:               # delivery goes on, but not without descriptors
                    wait(lambda: primary.messages, "a delivery")            # noqa: B023
                fails[0] = False
                people = ["x@two.example"]
                wait(lambda: client.send(marked(b"l"), recipients=people)[:3] == "250")         # noqa: B023
                wait(lambda: not spool_files(local.spool.path), "an empty spool")       # noqa: B023
                self.assertEqual([mark_of(data) for _, _, data in primary.messages], [b"first", b"l"])
                wait(lambda: not os.listdir(os.path.join(local.spool.path, "incoming")))        # noqa: B023
            self.assertEqual([line for line in local.log if "bug" in line], [])


class Mounts(Ledgers):
    """On file systems of their own, which only root can make."""

    def command(self, *words):
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            self.skipTest("%s: %s" % (words[0], done.stdout.decode("utf-8", "replace").strip()[:200]))

    def mount(self, *words):
        """A folder with a fresh file system on it; skips the test where that cannot be."""
        if os.geteuid() != 0:
            self.skipTest("only root can mount")
        folder = self.inner()
        self.command("mount", *words, folder)
        self.addCleanup(subprocess.run, ["umount", "-l", folder], stderr=subprocess.DEVNULL)
        return folder

    def cut_power(self, folder):
        """The file system forgets what is not on its disk, and does nothing more."""
        fd = os.open(folder, os.O_RDONLY)
        try:                                    # EXT4_IOC_SHUTDOWN, XFS_IOC_GOINGDOWN ...
            fcntl.ioctl(fd, 0x8004587D, struct.pack("I", 2))    # ... and 2: not even the journal is written
        except OSError as error:
            self.skipTest("no power cut here: %s" % error)
        finally:
            os.close(fd)

    def is_fresh(self, folder, image):
        """The journal is read, as after a start of the machine.  While somebody with a mount namespace of his
        own still has the old file system, that is what comes back."""
        self.command("umount", folder)
        self.command("mount", "-o", "loop", image, folder)
        with contextlib.suppress(OSError), open(os.path.join(folder, "fresh"), "wb") as file:
            os.fsync(file.fileno())             # reading is no proof: the old one still has it in memory
            return True
        return False

    def power_cuts(self, kind, times):
        image, chance, primary = self.path("image"), random.Random(times), self.primary(Taker)
        with open(image, "wb") as file:
            file.truncate(320 << 20)            # sparse; xfs wants 300 MB
        self.command(program("mkfs." + kind), "-q", image)
        folder = self.mount("-o", "loop", image)
        home = os.path.join(folder, "home")
        os.mkdir(home)
        relay = Relay(home, primary.address, relay=Storms.RELAY)
        self.addCleanup(relay.__exit__)
        for number in range(times):
            relay.write_config()
            os.sync()                           # the folder above the relay's is not its to make durable
            relay.start()
            if number % 2:
                primary.start()                 # then deliveries are cut, too
            senders = Senders(relay, people="abc"[:1 + number % 3])
            wait(lambda senders=senders: len(senders.ledger) > 30, "mail")
            senders.is_over.wait(chance.uniform(0.0, 0.5))
            self.cut_power(folder)
            senders.stop()
            relay.end(signal.SIGKILL)
            if primary.is_up:
                primary.stop()
            wait(lambda: self.is_fresh(folder, image), "a file system whose power was not cut")
            relay.start()
            self.compare(primary, relay, senders.ledger)
            primary.messages.clear()
            primary.stop()
            self.assertEqual(relay.end(), 0)

    def test_a_power_cut_under_load_loses_nothing_on_ext4(self):
        self.power_cuts("ext4", 1)

    @long_run
    def test_many_power_cuts_lose_nothing_on_ext4(self):
        self.power_cuts("ext4", 12)

    @long_run
    def test_many_power_cuts_lose_nothing_on_xfs(self):
        self.power_cuts("xfs", 12)


# -- hours of trouble, in seconds

class Soak(Simulated):
    """A primary that comes and goes, greylists, hangs, hangs up and refuses; an operator at work; clocks that
    are set; a relay that starts anew.  Nothing is ever stuck, lost, or sent twice."""

    WORDS = ["", "450 4.2.0 grey", "421 4.3.2 busy", CUT, HANG, "554 5.7.1 no"]
    DOMAIN_LINES = "retry_interval = 1m\nmax_retry_interval = 10m\nconnections = %d\n"

    def hours(self, seed, hours):
        self.row, self.chance = seed, random.Random(seed)
        sim = self.simulate(self.DOMAIN_LINES % 5)
        sim.extensions = [["PIPELINING"], [], ["PIPELINING", "CHUNKING"]][self.row % 3]
        self.is_up, self.steady = False, 0.0            # `steady`: since or from when on all is well
        self.came = {}                # ID: when it came, or was last held, let go or loaded
        self.seen = collections.Counter()
        # greylisted before; returned to their senders; being sent when the relay or the primary died
        self.met, self.ended, self.in_doubt = set(), set(), set()
        sim.reach = lambda name: None if self.is_up else self.chance.choice(["Connection refused", HANG])
        sim.script["."], sim.pace_s = self.answer, 0.01
        end = sim.clock.mono + 3600 * hours
        while sim.clock.mono < end:
            sim.run(self.chance.expovariate(0.15))
            self.chance.choices([self.arrive, self.burst, self.flap, self.err, self.operate],
                                [60, 2, 4, 1, 10])[0]()
            self.check()
        sim.queue.hold("all", False, lambda result: None)
        self.is_up, sim.script = True, {}
        sim.run(4 * 3600, until=lambda: not sim.one.entries)
        self.note_ends()
        self.assertEqual((sim.one.entries, set(self.came) - set(sim.taken) - self.ended), ({}, set()))
        self.seen.update(expired=len(self.ended), delivered=len(sim.taken))
        twice = {id for id, count in collections.Counter(sim.taken).items() if id and count > 1}
        self.assertEqual(twice - self.in_doubt, set())
        return self.seen

    def note_ends(self):
        lines = "".join(self.sim.journal.lines)
        self.ended.update(re.findall(r": (\w+): to=.* status=(?:expired|bounced)", lines))

    def arrive(self):
        self.came[self.sim.put("user@" + DOMAIN)] = self.sim.clock.mono

    def burst(self):
        for _ in range(self.chance.randint(20, 150)):
            self.arrive()

    def flap(self):
        self.is_up, self.steady = not self.is_up, max(self.steady, self.sim.clock.mono)
        self.in_doubt.update(self.sim.one.by_state[etrn.State.SENDING])
        for puppet in list(self.sim.puppets) if not self.is_up else ():
            self.sim.loop.post(puppet.on_end, "")

    def err(self):
        """It is there but half-configured for a while: 550 for everybody."""
        self.steady = self.sim.clock.mono + self.chance.uniform(5, 300)

    def answer(self, id):
        """Its word on a message."""
        word = self.chance.choices(self.WORDS, [900, 60, 9, 9, 3, 9])[0]
        if not self.sim.one.is_proven and self.chance.random() < 0.25:
            word = HANG                 # a canary's answer that never comes
        if word is HANG and self.sim.one.late:
            word = ""                   # two that hang may hold up the rest, where the primary is not up
        if word == self.WORDS[1] and id in self.met:
            word = ""                   # greylisted once
        self.met.add(id)
        self.seen[word] += 1
        return word if self.sim.clock.mono >= self.steady else "550 5.1.1 who?"

    def operate(self):
        """Commands, ETRN, SIGHUP, the primary's own connection, clocks that are set, a new start."""
        queue, sim = self.sim.queue, self.sim
        what = self.chance.choice("flush pardon hold some reload jump client start".split())
        self.seen[what] += 1
        if what in ("flush", "pardon"):
            getattr(queue, what)(queue.destinations.matching("all"))
        elif what == "client":
            queue.on_client(HOP.address)
        elif what == "jump":
            sim.clock.wall += self.chance.choice([-7200, -100, 100, 7200, 30 * 86400, -30 * 86400])
        elif what == "reload":
            sim.cfg = config("nameservers = 127.0.0.1:9\n", "primary = 192.0.2.1\nrecipients = any\n"
                             + self.DOMAIN_LINES % self.chance.randint(1, 8))
            queue.reconfigure(sim.cfg)
        elif what == "start":
            self.note_ends()
            self.in_doubt.update(sim.one.by_state[etrn.State.SENDING])
            sim.restart()
        else:
            for id in [DOMAIN] if what == "hold" else list(sim.one.entries)[:3]:
                queue.hold(id, self.chance.random() < 0.3, lambda result: None)
        if what in ("hold", "some", "start"):
            self.came = dict.fromkeys(self.came, sim.clock.mono)

    def check(self):
        sim, one = self.sim, self.sim.one
        for state, its in one.by_state.items():
            self.assertEqual(set(its), {id for id, entry in one.entries.items() if entry.state is state})
        self.assertEqual(one.octets, sum(entry.size for entry in one.entries.values()))
        self.assertTrue(1 <= one.limit <= one.cfg.connections)
        self.assertLessEqual(len(one.later), 2 * len(self.came) + 1000)
        if not sim.puppets and not sim.loop.posted:
            self.assertFalse(one.by_state[etrn.State.SENDING])
        offered = {id: at for at, id in sim.offered}
        for id, entry in one.entries.items():
            if entry.state is not etrn.State.HELD and self.is_up:
                waited = sim.clock.mono - max(self.came[id], self.steady, entry.due, offered.get(id, 0.0))
                most = 120 + etrn.END_OF_DATA_S * (id in one.late)          # it alone may hang
                self.assertLess(waited, most, "%s is stuck" % id)

    def test_an_hour_of_trouble_leaves_nothing_stuck(self):
        seen = sum((self.hours(seed, 0.7) for seed in range(3)), collections.Counter())
        self.assertGreater(seen["delivered"], 1000)
        self.assertGreater(min(seen[word] for word in (*self.WORDS, "start", "jump", "hold", "reload")), 0)

    @long_run
    def test_many_hours_of_trouble_leave_nothing_stuck(self):
        for seed in range(100, 112):
            self.hours(seed, 4.0)


# == 15. BENCH =================================================================
# `--bench`: how fast and how light, on this machine, without Postfix.  Nothing
# here is a test: figures depend on the machine and on what else it does.

HARD_S = 300.0                  # for one measurement; a relay that hangs must not hang the bench
# Each fsync takes so many milliseconds longer: what a slow card makes of it.
SLOW = "import os, time; os.fsync = lambda fd, real=os.fsync: (time.sleep(%f / 1000), real(fd)); "


async def send_all(port, count, sessions=50, size=4096):
    """Sessions that hand over messages as fast as they can.  Returns the seconds to each 250, sorted."""
    left, times = iter(range(count)), []
    body = (b"Subject: bench\r\n\r\n" + (b"x" * 70 + b"\r\n") * (size // 72 + 1))[:size] + b"\r\n.\r\n"

    async def session():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        mail = b"MAIL FROM:<a@sender.example>\r\nRCPT TO:<user@%s>\r\nDATA\r\n" % DOMAIN.encode()
        writer.write(b"HELO bench.example\r\n")
        replies = [await reader.readline() for _ in range(2)]
        for _ in left:
            writer.write(mail)
            replies += [await reader.readline() for _ in range(3)]
            writer.write(body)
            began = time.monotonic()
            replies.append(await reader.readline())
            times.append(time.monotonic() - began)
        assert {reply[:1] for reply in replies} <= {b"2", b"3"}, replies[-1]
        writer.close()
    await asyncio.wait_for(asyncio.gather(*(session() for _ in range(sessions))), HARD_S)
    return sorted(times)


class Sink(threading.Thread):
    """A primary that takes everything, with PIPELINING and, if asked, CHUNKING; counts messages."""

    def __init__(self, listener, chunking):
        super().__init__(daemon=True)
        self.listener, self.count, self.first, self.is_over = listener, 0, 0.0, False
        hello = b"250-sink\r\n250-PIPELINING\r\n" + b"250-CHUNKING\r\n" * chunking + b"250 8BITMIME\r\n"
        self.words = {b"EHLO": hello, b"QUIT": b"221 bye\r\n"}

    def run(self):
        asyncio.run(self.serve())

    async def serve(self):
        await asyncio.start_server(self.talk, sock=self.listener, limit=1 << 22)
        while not self.is_over:
            await asyncio.sleep(0.1)

    async def talk(self, reader, writer):
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        writer.write(b"220 sink\r\n")
        with contextlib.suppress(asyncio.CancelledError, OSError), contextlib.closing(writer):
            async for line in reader:
                verb = line[:4].upper()
                if verb == b"DATA":
                    writer.write(b"354 go\r\n")
                    await reader.readuntil(b"\r\n.\r\n")
                elif verb == b"BDAT":
                    await reader.readexactly(int(line.split()[1]))
                if verb in (b"DATA", b"BDAT"):
                    self.first = self.first or time.monotonic()
                    self.count += 1
                writer.write(self.words.get(verb, b"250 ok\r\n"))


class Bench:
    """One relay a measurement, in a folder of its own beside the others."""

    def __init__(self, fsync_ms, most):
        self.fsync_ms, self.most, self.number = fsync_ms, most, 0
        self.folder = tempfile.mkdtemp(prefix="etrn-bench-")

    @contextlib.contextmanager
    def relay(self):
        self.number += 1
        folder = os.path.join(self.folder, str(self.number))
        os.mkdir(folder)
        with Primary() as primary:
            port = unused_port()
            relay = Relay(folder, primary.address, listen="127.0.0.1:%d" % port, begin=(
                              SLOW % self.fsync_ms if self.fsync_ms else ""),
                          relay="max_connections_per_client = 0\nlog = relay.log\nmax_connections = 2000")
            relay.port = port
            self.start(relay)
            yield relay, primary
            relay.process.terminate()
            relay.process.wait(30)

    def start(self, relay):
        """Returns the seconds until it greets."""
        began = time.monotonic()
        relay.process = subprocess.Popen([*python(relay.begin), "{}", "--config", relay.file],
                                         stdin=subprocess.DEVNULL)

        def greets():
            with contextlib.suppress(OSError):
                relay.client().close()
                return True
            return False
        wait(greets, "the start")
        return time.monotonic() - began

    def accept(self, relay, count):
        cpu, began = processor_s(relay), time.monotonic()
        times = asyncio.run(send_all(relay.port, count))
        row("accept, 50 sessions, 4 KB", "%.0f msg/s" % (count / (time.monotonic() - began)),
            "%.2f ms" % ((processor_s(relay) - cpu) / count * 1000), "250 after %.0f ms, p99 %.0f ms" % (
                times[count // 2] * 1000, times[count * 99 // 100] * 1000), "%.0f MB" % memory_mb(relay))

    def drain(self, relay, primary, count, chunking):
        sink, cpu = Sink(primary.sock, chunking), processor_s(relay)
        sink.start()
        with relay.client() as client:
            client.say("ETRN " + DOMAIN)
        began = time.monotonic()
        wait(lambda: sink.count >= count, "the queue to be drained", HARD_S)
        row("drain" + ", CHUNKING" * chunking, "%.0f msg/s" % (count / (time.monotonic() - began)),
            "%.2f ms" % ((processor_s(relay) - cpu) / count * 1000),
            "first after %.0f ms" % ((sink.first - began) * 1000), "%.0f MB" % memory_mb(relay))
        sink.is_over = True
        sink.join()

    def weigh(self, relay):
        """Memory of idle clients, and of large messages at once."""
        before = memory_mb(relay)
        row("idle", "", "", "", "%.0f MB" % before)
        with contextlib.ExitStack() as stack:
            for _ in range(1000):
                stack.enter_context(relay.client())
            row("1,000 idle connections", "", "", "", "%+.0f MB" % (memory_mb(relay) - before))
        before = memory_mb(relay)
        asyncio.run(send_all(relay.port, 20, 20, 40 << 20))
        row("20 messages of 40 MB at once", "", "", "", "%+.0f MB" % (memory_mb(relay) - before))

    def grow(self, relay, primary, size):
        """What a message costs as the queue grows."""
        before = memory_mb(relay)
        relay.process.terminate()
        relay.process.wait(30)
        data = b"Received: by backup.example.net; x\r\nSubject: bench\r\n\r\n" + b"x" * 1000 + b"\r\n"
        for number in range(size):      # as the relay would have written it, but not synced
            id = "%X" % (0xABC0000000 + number)
            write_files(relay.spool, pair(sidecar_of(id), data))
        greeting = self.start(relay)
        wait(lambda: relay.json("--status")["spool"]["messages"] >= size, "the queue to be read", HARD_S)
        row("%d messages queued" % size, "", "", "greets after %.1f s" % greeting,
            "%.1f KB each" % ((memory_mb(relay) - before) * 1024 / size))
        self.accept(relay, 1000)
        began = time.monotonic()
        relay.run("--queue", DOMAIN)
        row("--queue %s" % DOMAIN, "", "", "%.1f s" % (time.monotonic() - began), "")
        self.drain(relay, primary, size + 1000, False)

    def run(self):
        try:
            row("", "rate", "processor", "time", "memory")
            count = 1500 if self.fsync_ms else 3000
            for chunking in (False, True):
                with self.relay() as (relay, primary):
                    self.accept(relay, count)
                    self.drain(relay, primary, count, chunking)
            for size in (0, 1000, 10000, 100000) if not self.fsync_ms else ():
                if size <= self.most:
                    with self.relay() as (relay, primary):
                        self.grow(relay, primary, size) if size else self.weigh(relay)
        finally:
            shutil.rmtree(self.folder, True)


def tell_of(relay, name):
    """What a file of /proc says of the relay and of its spool's process; nothing where there is none."""
    with contextlib.suppress(OSError):
        pid = relay.process.pid
        pids = [pid, *map(int, load("/proc/%d/task/%d/children" % (pid, pid)).split())]
        return [load("/proc/%d/%s" % (one, name)) for one in pids]
    return []


def processor_s(relay):
    """Seconds of processor time it has used."""
    return sum(sum(map(int, one.rpartition(")")[2].split()[11:13])) for one in tell_of(relay, "stat")) / (
        os.sysconf("SC_CLK_TCK"))


def memory_mb(relay):
    """Shared pages are counted once."""
    return sum(int(re.search(r"Pss:\s+(\d+)", one).group(1)) for one in tell_of(relay, "smaps_rollup")) / 1024


def row(what, rate, cost, times, memory):
    print(("%-32s %12s %10s  %-28s %12s" % (what, rate, cost, times, memory)).rstrip(), flush=True)


# -- running

class Result(unittest.TextTestResult):
    """A failure within a table tells the row."""

    def _exc_info_to_string(self, err, test):
        return super()._exc_info_to_string(err, test) + "".join(
            "\nat the %s %.1500r\n" % (key, vars(test)[key]) for key in ("row", "state") if key in vars(test))


def run_test(test, verbosity):
    """How it ended, and what it has to say."""
    stream = io.StringIO()
    runner = unittest.TextTestRunner(stream, verbosity=verbosity, resultclass=Result)
    result = runner.run(unittest.TestSuite([test]))
    if not result.wasSuccessful():
        return "failed", stream.getvalue()
    for _, reason in result.skipped:
        return "skipped", "\n%s: skipped, %s\n" % (test.id().partition(".")[2], reason)
    return "passed", stream.getvalue()


def run_tests(tests, processes, verbosity):
    """Numbers of tests that passed, failed and were skipped.  Most of them wait for something most of their
    time: so there are more processes than processors."""
    counts = collections.Counter()
    fork = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(processes, fork) as pool:
        runs = [pool.submit(run_test, test, verbosity) for test in reversed(tests)]     # the long ones first
        try:
            for run in concurrent.futures.as_completed(runs):
                died = run.exception()
                outcome, text = ("failed", "%s\n" % died) if died else run.result()
                counts[outcome] += 1
                print(text if outcome != "passed" or verbosity > 1 else ".", end="", flush=True)
        finally:
            for run in runs:
                run.cancel()            # at Ctrl-C
    return counts["passed"], counts["failed"], counts["skipped"]


def main():
    parser = argparse.ArgumentParser(description="Tests of etrn_relay.py.")
    parser.add_argument("-k", metavar="PATTERN", default="", help="only tests whose name contains PATTERN")
    parser.add_argument("-v", action="store_true", help="name each test")
    parser.add_argument("-j", metavar="N", type=int, default=8, help="in so many processes [8]")
    parser.add_argument("--long", action="store_true", help="also the tests that take minutes")
    parser.add_argument("--bench", action="store_true", help="measure speed and memory instead of testing")
    parser.add_argument("--fsync-ms", metavar="MS", type=float, default=0.0, help="--bench on so slow a disk")
    parser.add_argument("--most", metavar="N", type=int, default=10000, help="--bench: most queued [10000]")
    given = parser.parse_args()
    if given.bench:
        Bench(given.fsync_ms, given.most).run()
        return 0
    everything = unittest.TestLoader().loadTestsFromModule(sys.modules[__name__])
    wanted = given.k.replace(" ", "_").lower()
    tests = [test for group in everything for test in group if wanted in test.id().lower()
             and (given.long or not hasattr(getattr(test, test.id().rpartition(".")[2]), "is_long"))]
    # The relay is started a hundred times; it need not be compiled each time.
    with tempfile.TemporaryDirectory(prefix="etrn-test-") as cache:
        os.environ["PYTHONPYCACHEPREFIX"] = cache
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        counts = run_tests(tests, 1 if given.k else given.j, 1 + given.v)
    print("\n%d passed, %d failed, %d skipped" % counts)
    return 1 if counts[1] else 0


if __name__ == "__main__":
    sys.exit(main())



