#!/usr/bin/env python3
"""etrn_relay - a backup mail exchanger in one file

USAGE
    etrn_relay.py [--config FILE] [COMMAND] [OPTION]...

    Without a command the relay runs in the foreground.  The configuration is
    FILE, or $ETRN_RELAY_CONFIG, or ./etrn.conf, or /etc/etrn.conf.

  Commands
    --bounce ID|DOMAIN|all    return mail to its senders now
    --check                   read the config, look at DNS, ports and spool
    --delete ID|DOMAIN|all    remove mail; nobody is told
    --demo                    show a whole outage on loopback, in a few seconds
    --export DOMAIN           the queued messages as mbox on stdout
    --flush DOMAIN|@DOMAIN|all
                              deliver now; a progress bar on a terminal
    --hold ID|DOMAIN|all      keep mail until it is released
    --print-unit KIND         a unit for systemd, openrc, procd or launchd
    --probe DOMAIN            walk its route: what does each host answer?
    --queue [DOMAIN]          list the queue
    --release ID|DOMAIN|all   undo --hold
    --show ID                 envelope, attempts and headers
    --status                  primaries, queue, connections

  Options
    --config FILE             the configuration file
    --help, --version         print this page, or the version
    --json                    machine-readable output for --check --flush
                              --probe --queue --show --status
    --no-wait                 --flush returns at once [it waits]
    --raw                     --show prints the message as it will be sent
    --yes                     do not ask before --delete all, --bounce all

  Examples
    etrn_relay.py --config /etc/etrn.conf
    etrn_relay.py --flush example.org

  Exit status
    0 done   1 no such message or domain   64 usage   69 relay or primary
    out of reach   75 mail is still waiting, or try later   78 configuration

QUEUE
    Each message is a pair of plain files in the spool directory: ID.eml is the message as it
    will be sent, ID.json its sidecar: envelope, state of every recipient, expiry, SHA-256.
    A pair copied to another relay's spool is delivered from there after its next start or HUP.

    After the 250 at the end of the data, message, envelope and directory entries are on
    stable storage.  A message leaves the spool only by the primary's own 250, by its sender
    having been told, or by an operator's command.  A crash may make a second copy, never a loss.
    On a full disk new mail gets 452, and queued mail still leaves.

    A primary is unknown, up, down or rejecting.  While it is down and mail waits, it is tried
    every probe_interval at the longest.  When it greets, everything goes, oldest first: one
    message alone, then by 2, 4, 8 connections, up to `connections`.  For recovery_grace after an
    outage, or a start, no 5xx about queued mail is believed.  Three refused in a row after an
    outage make it rejecting: nothing is returned, and one message is tried every probe_interval,
    until it takes one or --flush is said.

    The status page lists what waits, and shows it, to whoever has a token: /queue/DOMAIN.

ETRN AND ATRN
    `ETRN example.org` (RFC 1985) probes that domain's primary at once and delivers everything
    but held mail; `ETRN @example.org` takes in the subdomains.  Mail goes to the domain's own
    primary, whoever asks; with primary = etrn to where the last authenticated ETRN came from.
    With primary = atrn it waits to be collected (RFC 2645): the customer's server connects to
    a port of odmr_listen, authenticates, says ATRN, and is the SMTP server from then on.

SIGNALS
    HUP   read the configuration again, reopen the log, look for copied mail
    USR1  probe every primary and deliver what can be delivered
    TERM, INT   stop within 5 seconds; nothing is lost

FILES
    SPOOL/incoming/, SPOOL/corrupt/     not acknowledged yet; pairs that could not be trusted
    SPOOL/state.json, recipients.json, history.json     what was learned
    SPOOL/control, SPOOL/lock           how commands reach the running relay

LOG LINES
    Postfix's grammar; one line an event, queue ID or NOQUEUE first:
    smtpd: ID: client=NAME[ADDRESS]
    qmgr: ID: from=<ADDRESS>, size=N, nrcpt=N (queue active)
    smtp: ID: to=<ADDRESS>, relay=HOST[ADDRESS]:PORT, delay=S, delays=A/B/C/D,
          dsn=X.Y.Z, status=sent|deferred|bounced|expired (WHY)
    qmgr: ID: removed
    bounce: ID: sender non-delivery notification: NEW-ID
    smtpd: NOQUEUE: reject: RCPT from NAME[ADDRESS]: REPLY; from=<> to=<> ...
    flush: etrn: site=DOMAIN, client=NAME[ADDRESS], messages=N, reply=CODE
    flush: command|signal: site=DOMAIN|all, messages=N
    primary: DOMAIN: up after 2h14m|down: WHY|rejecting: REPLY, N messages waiting
    master: started, configuration reread, stopping, and what is wrong with the machine

CONTENTS
    1 MANUAL  2 LIMITS  3 GRAMMAR  4 CONFIG  5 LOG  6 LOOP  7 SPOOL  8 SESSION  9 SCHEDULE
    10 DNS  11 DSN  12 DELIVERY  13 QUEUE  14 CONTROL  15 STATUS  16 SERVER  17 MAIN.
    Search for "== 7" and you are at the spool.
"""
# == 1. MANUAL =================================================================
# The text above.  `--help` prints its first part, up to QUEUE.

from __future__ import annotations

import argparse
import base64
import collections
import configparser
import contextlib
import dataclasses
import difflib
import email
import email.errors
import email.header
import email.message
import email.parser
import email.policy
import email.utils
import enum
import errno
import fcntl
import functools
import gc
import hashlib
import heapq
import hmac
import html
import http.client
import io
import ipaddress
import itertools
import json
import os
import pickle
import pwd
import random
import re
import resource
import secrets
import selectors
import shlex
import shutil
import signal
import smtplib
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import urllib.parse
import urllib.request
from typing import (Any, Callable, Deque, Dict, FrozenSet, Generator, Iterable, Iterator, List, Mapping,
                    NamedTuple, Optional, Sequence, Set, TextIO, Tuple, Type, Union)

try:                            # slim routers leave some modules out: only what needs them is refused there
    import syslog
except ImportError:
    syslog = None               # type: ignore[assignment]
try:
    import ssl
except ImportError:
    ssl = None                  # type: ignore[assignment]
try:
    import unicodedata
except ImportError:
    unicodedata = None          # type: ignore[assignment]
try:
    import ctypes
except (ImportError, MemoryError):      # the latter where no memory may be made executable
    ctypes = None               # type: ignore[assignment]

__version__ = "1.0"
if sys.version_info < (3, 8):
    sys.exit("etrn_relay.py needs Python 3.8 or newer")


# == 2. LIMITS =================================================================
# Every number that is not an option, with its unit and its reason.

Time = float                    # seconds since the epoch
INF = float("inf")
EX_OK, EX_MISSING, EX_USAGE, EX_UNAVAILABLE, EX_TEMPFAIL, EX_CONFIG = 0, 1, 64, 69, 75, 78

# -- what a client may send
COMMAND_MAX = 2048              # octets with line end; RFC 5321 4.5.3.1.4 wants 512, long paths need more
DOMAIN_MAX = 253                # octets of a name as text; RFC 5321 4.5.3.1.2: 255 with what DNS adds
ERRORS_MAX, JUNK_COMMANDS_MAX = 10, 100         # protocol errors, and idle commands a message
MAILBOX_LINES_MAX = 20          # mbox lines at the front of a message that become fields
HOPS_MAX, OWN_HOPS_MAX = 100, 3         # Received fields, RFC 5321 6.3; those of ours show a loop sooner
HEADER_FIELD_KEPT = 2000        # octets of one field looked at; `by` stands near its front
HEADER_SCAN_MAX = 262144        # octets of header looked through; what we look for is at the top
ENVID_MAX, ORCPT_MAX = 100, 500         # octets, RFC 3461 4.4 and 4.2
LOGIN_MAX, LOGINS_FAILED_MAX = 255, 3   # octets, RFC 4616 2; with the last failed AUTH the session ends
OVERSIZE_FACTOR = 2             # who sends more than this times the limit is cut off, not read to the end

# -- the loop
THREADS_MAX = 64                # for dials, names, alerts: what waits for others
RECEIVE_OCTETS = 65536          # read from one peer at a time, so that none holds the others up
COMMANDS_OCTETS = 4096          # ... of commands, which cost more
OUTPUT_MAX = 65536              # octets of replies left unread before we stop reading from a client
SPILL_OCTETS = 131072           # of a body in memory before they are given to the spool
UNWRITTEN_MAX, UNWRITTEN_TOTAL = 524288, 33554432       # octets of one body, of all; then clients wait
UNWRITTEN_LEAST = 16384         # of one body when many clients share the total
LISTEN_BACKLOG = 512            # connections the kernel may keep for us between two turns
HANDSHAKE_S = 30.0              # for a client's side of a TLS handshake
LOGIN_FAILED_S = 1.0            # a failed AUTH is answered so late: guessing gets slow
LINGER_S = 2.0                  # for a client to read our last reply before the connection is reset
STRESS_SHARE, STRESS_TIMEOUT_S = 0.8, 10.0      # of max_connections; idle clients then have so long
COMMAND_POLL_S, STOP_POLL_S, LOCK_POLL_S, DEMO_POLL_S = 0.1, 0.1, 0.05, 0.05    # between two looks
ACCEPTS_PER_TURN = 64           # new connections taken before those open are looked at again
ACCEPT_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)   # then the client still waits
SWEEP_S = 1.0                   # how often deadlines are looked at; they are seconds to minutes
WATCHDOG_S = 10.0               # between signs of life; the unit's WatchdogSec is 60
STOP_S = 3.0                    # at SIGTERM, for peers; all takes 5 s at most
STOP_DISK_S, STOP_BACKLOG_S = 1.0, 1.8  # then for a disk that does not answer, and for one that is slow
RESERVED_FILES = 64             # descriptors kept from clients for spool, threads, logs and DNS
DATA_RATE_MIN = 500             # octets a second in the long run, as Postfix's smtpd_min_data_rate
NAME_WAIT_S, NAME_KEPT_S = 1.0, 300.0   # a client's PTR name is waited for and kept
NAMES_AT_ONCE, NAMES_MAX = 10, 5000     # questions for names under way, and names kept

# -- the spool
BATCH_MAX = 64                  # messages made durable together
FAST_FSYNC_S = 0.0005           # where an fsync takes longer, those of a batch go beside each other
BLOCK_OCTETS, READ_OCTETS = 262144, 4194304     # read at once of a file, and ahead for a destination
LOCK_WAIT_S = 30.0              # for a command that holds the spool
RELAY_START_S = 2.0             # from a relay's lock to its control socket, at most
ORPHAN_S, COPY_S = 3600.0, 5.0          # a lone half, or a pair that makes no sense, may be being copied
SIDECAR_MAX = STATE_MAX = 256 << 20     # octets; far more than max_recipients and RECIPIENTS_MAX can fill
TIME_MAX = 253402300800.0       # dates of the year 10000 cannot be written, RFC 5322 3.3
RETRY_DISK_S, RETRY_READ_S = 5.0, 300.0         # after a failed write; the longest after a failed read
LOAD_BATCH, END_BATCH, LIST_BATCH = 200, 500, 1000      # messages loaded, ended or listed in one go
STATE_SAVE_S, HISTORY_SAVE_S = 60.0, 3600.0     # changes are saved no more often: flash wears out

# -- towards the primary
SMTP_PORT, SMTPS_PORT, ODMR_PORT = 25, 465, 366         # RFC 5321 4.5.4.2, RFC 8314 7.3, RFC 2645 5
CONNECT_S, COMMAND_S, DATA_S, BLOCK_S = 30.0, 300.0, 120.0, 180.0       # RFC 5321 4.5.3.2
END_OF_DATA_S = 600.0           # short waits here make duplicates, RFC 1047
LATE_S = 10.0                   # an answer is late then, and others go by another connection
KEEPALIVE = (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3),
             ("TCP_USER_TIMEOUT", 50000))       # s, s, a count, ms: a dead peer shows within a minute
XCLIENT_VALUE_MAX = 255         # characters of a client's HELO; Postfix takes lines of 512
REPLY_LINES_MAX, REPLY_OCTETS_MAX = 100, 65536  # of one reply; an EHLO answer has about a dozen lines
RCPTS_PER_TRANSACTION = 100     # what every server must take, RFC 5321 4.5.3.1.8
CHUNK_MESSAGES = 16             # whole messages in flight with CHUNKING; a break leaves all in doubt
CHUNK_OCTETS, CHUNK_REPLIES = 262144, 250       # no further one behind so much unread, RFC 2920 3.1
IDLE_CONNECTION_S = 2.0         # a connection waits so long for another message before QUIT
FETCH_MOST, FETCH_LOW = 32, 16  # messages read ahead, and when the next are
UNRECORDED_MAX = 256            # messages sent and not yet removed; then no more are given out
HANGING_MAX = 2                 # dials or late connections to a primary that is not up
LATE_MAX = 10                   # late connections to one that is up; behind more none is opened unasked
DIALS_MAX, DIALS_RESERVED = 50, 15      # threads, and those of them for primaries not known to be down
OUTBOUND_MAX = 200              # connections to all primaries together
PROBE_FIRST_S = 1.0             # first pause between tries of a primary that is away
TRIGGER_S = 1.0                 # a flood of ETRNs costs one probe a second
NOTICE_CONNECTIONS = 2          # to a smarthost or a sender's server
NOTICE_LIFETIME_S = 432000.0    # 5 days at least, as Postfix keeps bounces
NOTICE_PROBE_S = 300.0          # longest pause between attempts to reach one of those
SIZE_LEAST = 65536              # a smaller SIZE of a primary is nonsense, RFC 5321 4.5.3.1.7
RECEIVED_OCTETS = 1024          # our Received field, which counts for the primary's SIZE
OUT_OF_STEP = (500, 502, 503, 504)      # no word about a message: we are out of step
NO_SUCH_USER = ("5.1.1", "5.1.2", "5.1.3", "5.1.6", "5.1.10")   # about a recipient, RFC 3463 3.2
VERDICTS = 20                   # the last answers looked at: mostly 4xx halves the connections
REFUSED_ROW = 3                 # refused in a row, and a returned primary is `rejecting`
FEW_ANSWERS = 3                 # who hangs up after no more has not had its fill of the connection
CANARIES_DEFERRED = 3           # 4xx to so many canaries is greylisting: the rest goes all the same
EARLY_PAUSES_S = (60.0, 300.0)  # after the first two 4xx or kept 5xx of a returned primary
ATRN_SILENT_S = 60.0            # who collects is taken for gone when silent so long and another comes
PART_S = 5.0                    # for answers of a primary that has moved meanwhile
STAGGER_S, HOST_STAGGER_S = 0.25, 4.0   # before the next address or host is tried too, RFC 8305 5
ATTEMPTS_MIN, UNCOLLECTED_S = 3, 10800.0        # failed attempts, or a wait, behind each expiry
CLOCK_JUMP_S = 60.0             # wall and monotonic clock apart by more at once is a jump
ALERT_S, ALERT_EXPIRY_S = 30.0, 86400.0         # for a command or web hook; so long before mail expires
CUT_THROUGH_S, CALL_AHEAD_S = 30.0, 5.0         # a client waits for a verdict, or a recipient
GOOD_S, BAD_S = 31 * 86400.0, 3 * 86400.0       # a recipient is known so long
BAD_ROW = 5                     # refused in a row with no good one known are doubted
ACCEPT_ALL_S = 86400.0          # a primary that takes any local part is not asked for a day
SLACK_S = 86400.0               # the clock may be set back so far, and what was learnt still holds
RECIPIENTS_MAX, GREYLIST_MAX = 50000, 50000     # remembered; the bad and the oldest go first
KNOWN_UP_S = 60.0               # word from the primary within so long means that it is up
GREYLIST_TRIES, GREYLIST_WAIT_S, GREYLIST_S = 3, 300.0, 86400.0     # the third after 5 minutes, within a day

# -- names
DNS_TRY_S, DNS_TOTAL_S = 3.0, 20.0      # for one answer from one server, and for a question with its aliases
DNS_CNAMES_MAX, DNS_RECORDS_MAX = 10, 100       # aliases followed, and records looked at in one answer
ROUTE_HOSTS_MAX = 20            # addresses tried for one primary

# -- the status page
PAGE_CONNECTIONS = 32           # at once; who comes then waits in the backlog
REQUEST_MAX = 16384             # octets of a request, or of a command; browsers send under 2,000
PAGE_TOTAL_S, PAGE_STALL_S = 10.0, 60.0         # for a request and its answer; for mail, without progress
PAGE_REFRESH_S = 15             # the page reloads itself
PAGE_DOMAINS_MAX = 100          # shown with all there is; those in trouble come first
PAGE_MESSAGES, SEARCH_MESSAGES = 50, 5000       # listed at a time, and looked through for a word
LETTER_OCTETS, LETTER_LINES, LETTER_PARTS = 1 << 20, 50000, 300     # of a message, looked at
LETTER_TEXT = 100000            # characters of it shown
PAGE_REST = 3                   # times as long as a page took to read the mail goes alone
SWITCH_S = 0.0001               # for the loop to get the interpreter back from a thread that computes
LEFT_KEPT = 1000                # messages that have left, remembered for who still reads them
CERTIFICATE_WARNING_S = 14 * 86400.0    # before it ends; who renews by machine does so a month before
HISTORY_HOURS, HISTORY_DOMAINS_MAX = 168, 100   # for the chart: a week, of so many domains

# -- texts and the command line
LOG_TEXT_MAX = 500              # characters of foreign text in one log line
NOTABLE_MAX = 40                # log lines kept for the page, half as many of each service at most
RESPONSE_MAX, REPLY_PART_MAX = 400, 120         # characters kept of a reply, and shown in one of ours
LINE_MAX, FIELD_MAX = 990, 900  # octets of a line of ours, RFC 5322 2.1.1, and of a value that is shown
FOLD_WIDTH = 72                 # characters of a line of ours in a notice; RFC 5322 2.1.1: at most 78
NOTICE_FULL_MAX = 1 << 20       # octets; a larger original is returned as headers
PROBE_ROUTE_S, PROBE_HOSTS_S = 12.0, 16.0       # --probe: for the DNS, and for all hosts side by side
PROBE_REPLY_S, CHECK_S = 10.0, 25.0     # for one reply, and for all that --check asks of others
DEMO_WAIT_S = 8.0               # for each step; the whole demonstration takes under 20 seconds


# == 3. GRAMMAR ================================================================
# Replies, domains, addresses, parameters, and how numbers and foreign text are shown.  Pure; uses
# 2 LIMITS.  All that is sent on is built of what these functions return: it is what was judged.

class Reply(NamedTuple):
    """`text` may have several lines; `status` is the enhanced code of RFC 3463 or empty."""
    code: int
    status: str
    text: str

    @functools.lru_cache(maxsize=256)       # the same few are said again and again
    def wire(self) -> bytes:
        status, lines = self.status and self.status + " ", self.text.split("\n")
        marks = "-" * (len(lines) - 1) + " "            # RFC 5321 4.2.1
        return "".join("%d%s%s%s\r\n" % (self.code, mark, status, line)
                       for mark, line in zip(marks, lines)).encode("utf-8", "replace")

    def __str__(self) -> str:
        return " ".join(filter(None, (str(self.code), self.status, self.text.replace("\n", " "))))


class Refuse(Exception):
    """The peer's mistake: becomes `reply` on the wire, and one log line."""

    def __init__(self, code: int, status: str, text: str) -> None:
        super().__init__(text)
        self.reply = Reply(code, status, text)


CONTROLS = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")     # TAB is not one of them: it counts as a blank
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)
DEVIATING = re.compile("[\u00df\u1e9e\u03c2\u200c\u200d]")      # sharp s, final sigma, joiners: RFC 5894 7.2
_DOTTED = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.\-\u0080-\U0010ffff]+"     # dots anywhere, RFC 5321 or not
_QUOTED = r'"(?:[^"\\\x00-\x1f\x7f]|\\[\x20-\x7e])*"'
_DOMAIN = r"(?P<domain>\[[^\[\]<>\s]*\]|[^\s<>@\[\]]+)"
_PATH = re.compile(r"<(?P<route>@[^\s<>:,]+(?:,@[^\s<>:,]+)*:)?(?:(?P<local>%s|%s)@%s|(?P<bare>%s)?)>"
                   % (_DOTTED, _QUOTED, _DOMAIN, _DOTTED))
_PLAIN = re.compile(r"(?P<route>)(?:(?P<local>%s)@%s|(?P<bare>(?i:postmaster)))" % (_DOTTED, _DOMAIN))
_PARAMETER = re.compile(r"([A-Za-z0-9][A-Za-z0-9-]*)(?:=([^\x00-\x20=\x7f]+))?")
_XTEXT = re.compile(r"(?:[!-*,-<>-~]|\+[0-9A-Fa-f]{2})*")


@functools.lru_cache(maxsize=4096)
def parse_domain(text: str) -> str:
    """Lower-case A-labels; one final dot is dropped (RFC 5321 4.1.2, RFC 5890).
    Raises ValueError.  Underscores pass: some senders have them."""
    text = text[:-1] if text[-1:] == "." else text
    try:
        labels = [label.lower() if label.isascii() else _encode_label(label) for label in text.split(".")]
    except LookupError:                     # where Python came without its tables
        labels = [""]
    name = ".".join(labels)
    if len(name) > DOMAIN_MAX or labels[-1].isdigit() or not all(map(_LABEL.fullmatch, labels)):
        raise ValueError("not a domain name")
    return name


def _encode_label(label: str) -> str:
    """The A-label of a U-label; empty for an ASCII name in disguise, like one in full-width letters, which
    the primary may take for another's.  The codec knows IDNA 2003 only, and makes another
    domain of DEVIATING letters: it only checks such a label.  Raises UnicodeError."""
    encoded = label.encode("idna").decode("ascii")
    if not DEVIATING.search(label):
        return encoded if encoded.startswith("xn--") else ""
    lower = "".join(c.lower() for c in label)       # one by one: lower() of a word makes final sigmas
    return "xn--" + unicodedata.normalize("NFC", lower).encode("punycode").decode("ascii")


def parse_literal(text: str) -> str:
    """The address in an address literal with its brackets, RFC 5321 4.1.3.  Raises
    ValueError, for a zone too: it means nothing to another host."""
    kind, address = text[1:6].upper(), text[6:-1].replace("%", "no zone")
    return str(ipaddress.IPv6Address(address) if kind == "IPV6:" else ipaddress.IPv4Address(text[1:-1]))


class Path(NamedTuple):
    """One address.  `domain` is for comparing: lower-case A-labels, no final dot; empty
    for `<>` and `<postmaster>`; an address literal has its brackets.  `written` goes on:
    the domain as it came, without a final dot; empty where it is `domain` itself."""
    local: str
    domain: str
    written: str = ""
    routed: bool = False        # came with a source route, RFC 5321 C

    def __str__(self) -> str:
        return "%s@%s" % (self.local, self.written or self.domain) if self.domain else self.local

    @property
    def key(self) -> str:
        """The same for every spelling: what lists and memory of recipients hold."""
        return "%s@%s" % (self.local.lower(), self.domain)

    @property
    def is_rerouting(self) -> bool:
        """Percent hack, bang path, source route, literal, quoted @: some primary might send it on."""
        return self.routed or self.domain[:1] == "[" or any(c in self.local for c in "%!@")


def parse_path(text: str, status: str) -> Tuple[Path, str]:
    """The address at the start of `text` (RFC 5321 4.1.2), and the text behind
    it.  A plain one needs no angle brackets.  Raises Refuse(501, status)."""
    match = (_PATH if text[:1] == "<" else _PLAIN).match(text)
    if not match or (match.group("route") and not match.group("local")):
        raise Refuse(501, status, "Syntax error in address")
    route, local, domain, bare = match.group("route", "local", "domain", "bare")
    rest = text[match.end():]
    if rest[:1] not in ("", " ", "\t"):
        raise Refuse(501, "5.5.4", "Syntax error after the address")
    if local is None:
        return Path(bare or "", ""), rest
    try:
        for hop in re.findall(r"@([^\[,:][^,:]*)", route or ""):
            parse_domain(hop)
        if domain[0] == "[":
            parse_literal(domain)
        name = domain if domain[0] == "[" else parse_domain(domain)
    except ValueError:
        raise Refuse(501, status, "Syntax error in the address's domain") from None
    return Path(local, name, domain[:-1] if domain[-1] == "." else domain, bool(route)), rest


def parse_parameters(text: str) -> Dict[str, Optional[str]]:
    """ESMTP parameters of MAIL and RCPT, keys in upper case (RFC 5321 4.1.2)."""
    found: Dict[str, Optional[str]] = {}
    for word in filter(None, text.replace("\t", " ").split(" ")):
        match = _PARAMETER.fullmatch(word)
        if not match or match.group(1).upper() in found:
            raise Refuse(501, "5.5.4", "Syntax error in parameters")
        found[match.group(1).upper()] = match.group(2)
    return found


def parse_xtext(text: Optional[str], longest: int) -> str:
    """RFC 3461 4, still encoded, as it goes on.  Hex digits become capitals, which some senders forget."""
    if not text or len(text) > longest or not _XTEXT.fullmatch(text):
        raise Refuse(501, "5.5.4", "Syntax error in parameters")
    return re.sub(r"\+..", lambda hex_octet: hex_octet.group().upper(), text)


def decode_xtext(text: str) -> str:
    return re.sub(r"\+([0-9A-Fa-f]{2})", lambda match: chr(int(match.group(1), 16)), text)


def encode_xtext(text: str, longest: int) -> str:
    """RFC 3461 4, cut to so many characters, but not within the three of an octet."""
    encoded = "".join(chr(octet) if 33 <= octet <= 126 and octet not in b"+=" else "+%02X" % octet
                      for octet in text.encode("utf-8"))
    return re.sub(r"\+.?$", "", encoded[:longest])


def parse_notify(text: Optional[str]) -> str:
    """NOTIFY of RFC 3461 4.1, in upper case."""
    words = (text or "").upper().split(",")
    if words != ["NEVER"] and (set(words) - {"SUCCESS", "FAILURE", "DELAY"} or len(set(words)) != len(words)):
        raise Refuse(501, "5.5.4", "Syntax error in NOTIFY")
    return ",".join(words)


def parse_orcpt(text: Optional[str]) -> str:
    """ORCPT of RFC 3461 4.2: `addr-type;xtext`."""
    kind, _, address = (text or "").partition(";")
    if not re.fullmatch(r"[A-Za-z0-9-]+", kind) or not 0 < len(address) <= ORCPT_MAX:
        raise Refuse(501, "5.5.4", "Syntax error in ORCPT")
    if kind.lower() != "utf-8":                     # RFC 6533 3 has an encoding of its own
        address = parse_xtext(address, ORCPT_MAX)
    return "%s;%s" % (kind, address)


def parse_size(text: Optional[str]) -> int:
    """SIZE of RFC 1870 4: up to 20 digits."""
    if not re.fullmatch(r"[0-9]{1,20}", text or ""):
        raise Refuse(501, "5.5.4", "Syntax error in SIZE")
    return int(text or 0)


def parse_address(text: str) -> Union[ipaddress.IPv4Address, ipaddress.IPv6Address]:
    """Without its zone (`fe80::1%eth0`), which Python 3.8 does not know.  Raises ValueError."""
    return ipaddress.ip_address(text.partition("%")[0])


def is_address(text: Any) -> bool:
    """An IP address, perhaps with the zone of a link-local one."""
    try:
        return bool(parse_address(text))
    except (ValueError, AttributeError):
        return False


def is_below(name: str, parent: str) -> bool:
    """Whether `name` is `parent` or a subdomain: whole, or on a dot boundary."""
    return name == parent or name.endswith("." + parent)


def client_network(address: str) -> str:
    """The addresses that count as one client: an IPv4 address, or an IPv6 /64."""
    if ":" not in address:
        return address
    return parse_address(address).packed[:8].hex()


def greylist_network(address: str) -> str:
    """The addresses that count as one sender's hosts: an IPv4 /24, or an IPv6 /64."""
    return client_network(address) if ":" in address else address.rpartition(".")[0]


def format_duration(seconds: float) -> str:
    """The largest unit in it and, unless it is 0, the next smaller, for tables and log lines: 45s, 2h14m."""
    parts = [(int(max(0, seconds)) // size % most, unit) for unit, size, most in (
        ("d", 86400, 1 << 32), ("h", 3600, 24), ("m", 60, 60), ("s", 1, 60))]
    while len(parts) > 1 and not parts[0][0]:
        del parts[0]
    return "".join("%d%s" % part for part in parts[:1] + [one for one in parts[1:2] if one[0]])


def format_age(seconds: float) -> str:
    """The same for people who read a sentence: 3 days and 2 hours."""
    nouns = {"d": "day", "h": "hour", "m": "minute", "s": "second"}
    parts = re.findall("([0-9]+)(.)", format_duration(max(1, seconds)))
    return " and ".join(plural(int(count), nouns[unit]) for count, unit in parts)


def format_size(octets: float) -> str:
    for unit in "BKMG":
        if octets < 1024 or unit == "G":
            break
        octets /= 1024
    return ("%d%s" if unit == "B" or unit != "G" and octets >= 10 else "%.1f%s") % (octets, unit)


def plural(count: int, noun: str) -> str:
    return "%d %s%s" % (count, noun, "" if count == 1 else "s")


def printable(text: str, longest: int = LOG_TEXT_MAX) -> str:
    """Foreign text for a log line, a terminal or a header: one line, cut, without control characters."""
    text = text if len(text) <= longest else text[:longest] + "..."
    return text if text.isprintable() else "".join(
        c if c.isprintable() else ("\\x%02x" if ord(c) < 256 else "\\u%04x") % ord(c) for c in text)


@functools.lru_cache(maxsize=16)
def format_date(second: int) -> str:
    """RFC 5322 3.3, local time.  All that arrives within a second bears the same."""
    return email.utils.formatdate(second, localtime=True)


def format_peer(address: str, name: str = "unknown") -> str:
    return "%s[%s]" % (name, address)


def format_delay(seconds: float) -> str:
    """As Postfix logs it: two digits of a short one, whole seconds of a long one, never an exponent."""
    return "%.2g" % seconds if 0.001 <= seconds < 10 else "%d" % seconds


# == 4. CONFIG =================================================================
# Text in, a frozen Config or a ConfigError with file and line out.  Opens no file, so --check
# and SIGHUP judge the same way.  Uses 2 LIMITS and 3 GRAMMAR.  Each option is one field of
# Config or DomainConfig: parser, ranges and defaults come from these, and by its test the sample.

class ConfigError(Exception):
    def __init__(self, file: str, line: int, text: str) -> None:
        super().__init__("%s:%d: %s" % (file, line, printable(text)))


class Endpoint(NamedTuple):
    """The host is a name, or an address without brackets; a link-local one has its zone."""
    host: str
    port: int

    def __str__(self) -> str:
        return ("[%s]:%d" if ":" in self.host else "%s:%d") % (self.host, self.port)


Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]
Networks = Tuple[Network, ...]
Endpoints = Tuple[Endpoint, ...]
Hosts = Union[str, Endpoints]   # a word with a meaning of its own, or hosts
Route = Union[str, Endpoint]
DAY_S, WEEK_S, YEAR_S = 86400.0, 604800.0, 31536000.0
_UNITS_S = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": DAY_S, "w": WEEK_S}
_UNITS_OCTETS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
Kind = Callable[[str], Any]     # makes a value of its text, or raises ValueError with a word for the operator


def parse_login(text: str) -> str:
    """A name or a password that fits into PLAIN, RFC 4616 2."""
    if len(text.encode("utf-8")) > LOGIN_MAX or not text.isprintable():
        raise ValueError("longer than %d octets, or with control characters" % LOGIN_MAX)
    return text


def parse_file(text: str) -> str:
    if not text or re.search(r"[\"'~$\x00-\x1f]", text):
        raise ValueError("'%s' is not a path: it is taken as it stands, without quotes, ~ and $" % text)
    return text


def parse_hostname(text: str, kind: str = "host name") -> str:
    try:
        name = parse_domain(text)
    except ValueError:
        raise ValueError("'%s' is not a %s" % (text, kind)) from None
    if DEVIATING.search(text):          # IDNA 2003 makes another name of it than IDNA 2008
        raise ValueError("'%s' is another name to old programs: write the A-label, %s" % (text, name))
    return name


def parse_served(text: str) -> str:
    """A domain, or `.domain` for all below it."""
    dot = "." if text.startswith(".") else ""
    return dot + parse_hostname(text[len(dot):], "domain")


def parse_mail_address(text: str) -> str:
    try:
        path, rest = parse_path("<%s>" % text, "5.1.3")
    except Refuse:
        path, rest = Path("", ""), ""
    if not path.domain or rest:
        raise ValueError("'%s' is not a mail address" % text)
    if path.domain[0] != "[":
        parse_hostname(path.written)
    return str(path)


def parse_key(text: str) -> str:
    return parse_path("<%s>" % text, "5.1.3")[0].key


def parse_endpoint(text: str, port: int = SMTP_PORT, least: int = 1, is_named: bool = True) -> Endpoint:
    """`host`, `host:port`, `[address]:port`, or an address; `port` is for one that names none."""
    head, _, tail = text.rpartition(":")
    if ":" in head and tail.isdigit() and is_address(text) and is_address(head):
        raise ValueError("'%s' may or may not end with a port: write [%s]:%s" % (text, head, tail))
    match = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^\[\]:]+))(?::([0-9]{1,5}))?", text)
    bracketed, plain, digits = match.groups() if match else (text, "", "")
    host, percent, zone = (bracketed or plain).partition("%")       # Python 3.8 does not know zones
    if is_address(host):
        host = str(ipaddress.ip_address(host)) + percent + zone
        if percent and not re.fullmatch(r"fe[89ab][0-9a-f]:[^.%]*%[^\s%/]+", host):
            raise ValueError("'%s': only a link-local address has a zone, like fe80::1%%eth0" % text)
    elif bracketed or not is_named:
        raise ValueError("'%s' is not an address%s, with or without :port" % (text, " or host" * is_named))
    else:
        host = parse_hostname(plain)
    if not least <= int(digits or port) <= 65535:
        raise ValueError("'%s' needs a port between %d and 65535" % (text, least))
    return Endpoint(host, int(digits or port))


def parse_listener(text: str, port: int = SMTP_PORT) -> List[Endpoint]:
    """An address to serve.  A bare port means all addresses, localhost both loopback ones."""
    where = parse_endpoint("0.0.0.0:" * text.isdigit() + text, port, 0)
    hosts = ["127.0.0.1", "::1"] if where.host == "localhost" else [where.host] + ["::"] * text.isdigit()
    if not is_address(hosts[0]) or "%" in where.host:
        raise ValueError("'%s' is not an address of this machine" % text)
    return [Endpoint(host, where.port) for host in hosts]


def parse_route(text: str) -> Route:
    return "mx" if text.lower() == "mx" else parse_endpoint(text)


def matching(pattern: str, fault: str, value: Callable[[Any], Any] = lambda match: match.group()) -> Kind:
    """The kind whose texts match `pattern`, in capitals or not."""
    def parse(text: str) -> Any:
        match = re.fullmatch(pattern, text, re.IGNORECASE | re.ASCII)
        if not match:
            raise ValueError("'%s' is %s" % (text, fault))
        return value(match)
    return parse


def one_of(*words: str) -> Kind:
    return matching("|".join(words), "not one of: " + ", ".join(words), lambda match: match.group().lower())


@dataclasses.dataclass(frozen=True)
class ListOf:
    """The kind of a list, which may go on in further lines; or of one of `words`, alone."""
    parse: Kind
    words: Tuple[str, ...] = ()
    make: Callable[[Any], Any] = tuple

    def __call__(self, text: str) -> Any:
        parts = text.replace(",", " ").split()
        alone = [part.lower() for part in parts if part.lower() in self.words]
        if not parts or alone and len(parts) > 1:
            raise ValueError("'%s' stands alone" % alone[0] if alone else "is empty")
        return alone[0] if alone else self.make(self.parse(part) for part in parts)


# Values of the kinds str and parse_login have no comments behind them: " #" and " ;" may belong to them.
ACCOUNT = matching(r"\S+", "not the name of an account")
COUNT = matching(r"[0-9]{1,9}", "not a whole number", lambda match: int(match.group()))
DURATION = matching(
    r"(off|no|none)|([0-9]{1,9}(?:\.[0-9]+)?)\s*([smhdw]?)", "not a duration (like 30s, 5m, 4h, 7d, 2w)",
    lambda match: 0.0 if match.group(1) else float(match.group(2)) * _UNITS_S[match.group(3).lower()])
FLAG = matching(r"(yes|on|true|1)|no|off|false|0", "neither yes nor no", lambda match: bool(match.group(1)))
OCTETS = matching(r"([0-9]{1,15})\s*([KMG]?)", "not a size (like 512K, 50M, 1G)",
                  lambda match: int(match.group(1)) * _UNITS_OCTETS[match.group(2).lower()])
TLS = matching(r"none|may|require|verify|sha256:(?:[0-9a-f]{2}:?){32}",
               "not one of: none, may, require, verify, sha256:HEX",
               lambda match: re.sub(r"(?<!sha256):", "", match.group().lower()))
URL = matching(r"https?://[!-~]+", "not a web address (like https://example.org/hook)")
DOMAINS, NETWORKS = ListOf(parse_served), ListOf(ipaddress.ip_network)
ETRN, PRIMARY = ListOf(ipaddress.ip_network, ("any", "none")), ListOf(parse_endpoint, ("mx", "atrn", "etrn"))
NAMESERVERS = ListOf(functools.partial(parse_endpoint, port=53, is_named=False))
LISTEN = ListOf(parse_listener, make=lambda found: tuple(dict.fromkeys(itertools.chain(*found))))
ODMR_LISTEN = ListOf(functools.partial(parse_listener, port=ODMR_PORT), make=LISTEN.make)
RECIPIENTS = ListOf(lambda text: parse_key(parse_mail_address(text)), ("any", "verify"), frozenset)


class Option(NamedTuple):
    """How an option is written: the metadata of its field."""
    parse: Kind
    default: str                # as text; "" for none
    text: str                   # for the sample
    low: float = 0              # least and largest value of a number: seconds, octets, a count
    high: float = INF
    none: Any = ""              # the value where there is none
    paths: Tuple[str, ...] = ()         # a text that begins so is a path

    def read(self, text: str, folder: str) -> Any:
        """The value.  Paths are relative to `folder`.  Raises ValueError."""
        if not self.default and text.lower() in ("", "none"):
            return self.none
        if not text:
            raise ValueError("is empty")
        if (self.parse is parse_file or text.startswith(self.paths)) and text not in ("stderr", "syslog"):
            head = "file:" if "file:" in self.paths else ""
            return head + os.path.join(folder, parse_file(text[len(head):].strip()))
        value = self.parse(text)
        if isinstance(value, (int, float)) and not self.low <= value <= self.high:
            show = {DURATION: format_duration, OCTETS: format_size}.get(self.parse, str)
            most = " at least" if self.high == INF else " to " + show(self.high)
            raise ValueError("'%s' is out of range (%s%s)" % (text, show(self.low), most))
        return value


def option(*given: Any, **named: Any) -> Any:
    row = Option(*given, **named)
    return dataclasses.field(default=row.read(row.default, ""), metadata={"option": row})


@dataclasses.dataclass(frozen=True)
class DomainConfig:
    name: str                   # "example.com", ".example.com", or "" for [defaults]
    primary: Hosts = option(PRIMARY, "mx", "Where the mail goes: mx; hosts in order, like [192.0.2.7]:2525; "
                            "atrn (it is collected); or etrn (where the last authenticated ETRN came from).")
    lifetime: float = option(DURATION, "7d", "How long mail is kept before the sender is told.", 1, YEAR_S)
    delay_notice: float = option(DURATION, "off", "Age at which the sender is told of the delay.", 0, YEAR_S)
    recipients: Union[str, FrozenSet[str]] = option(
        RECIPIENTS, "verify", "any; verify (ask the primary, and remember); addresses; or file:PATH with an "
        "address or @domain a line.", paths=("file:",))
    while_up: str = option(
        one_of("relay", "defer"), "relay", "Or defer: while the primary is up, mail is taken at its third "
        "try, which keeps away spam that aims at the last MX.")
    unknown_recipients: str = option(
        one_of("accept", "defer"), "accept", "While the primary is down and nobody knows: accept or defer.")
    cutthrough: bool = option(FLAG, "yes", "While the primary is up, answer with its own verdict.")
    etrn: Union[str, Networks] = option(ETRN, "any", "Who may ask to flush: any, none, or networks.")
    username: str = option(parse_login, "", "For ATRN and authenticated ETRN.  Domains may share one.")
    password: str = option(parse_login, "", "The password, or file:PATH.", paths=("file:",))
    token: str = option(str, "", "Opens this domain's mail, and nothing else, on the status page.")
    tls: str = option(TLS, "may", "Towards the primary: none, may, require, verify, or sha256:HEX.")
    connections: int = option(COUNT, "10", "Most delivery connections to the primary at once.", 1, 100)
    probe_interval: float = option(DURATION, "5s", "Mail waits: a down primary is tried so often.", 1, 3600)
    retry_interval: float = option(DURATION, "5m", "A message's first pause after 4xx; doubles ...", 1, DAY_S)
    max_retry_interval: float = option(DURATION, "1h", "... up to this.", 1, WEEK_S)
    recovery_grace: float = option(DURATION, "1h", "So long after an outage 5xx are tried again.", 0, WEEK_S)
    xclient: bool = option(FLAG, "no", "Hand the client to a primary that offers XCLIENT or XFORWARD.")
    max_queue_size: Optional[int] = option(OCTETS, "", "Octets queued here; more get 452.", 1, none=None)
    is_notices: bool = False    # no domain of ours: our notices and alerts


@dataclasses.dataclass(frozen=True)
class Config:
    """All options: those of [relay] by their name, others by section_name."""
    file: str
    defaults: DomainConfig
    hostname: str = option(parse_hostname, "", "The name in MX records for this host; else its full name.")
    listen: Endpoints = option(LISTEN, "0.0.0.0:25, [::]:25", "Where to serve SMTP; 25 means everywhere.")
    spool: str = option(parse_file, "spool", "The directory of all state.  Paths are relative to this file.")
    user: str = option(ACCOUNT, "", "Account to become once ports are bound; it must own the spool.")
    domains: Mapping[str, DomainConfig] = option(DOMAINS, "", "Domains that need no section.", none=())
    nameservers: Hosts = option(
        NAMESERVERS, "/etc/resolv.conf", "DNS servers: addresses (a link-local one like fe80::1%eth0), and "
        ":port; or a file like it.", paths=("/", "./", "../"))
    log: str = option(parse_file, "stderr", "stderr, syslog, or a file (reopened on SIGHUP).")
    log_level: str = option(one_of("debug", "info", "warning", "error"), "info", "Or debug, warning, error.")
    max_message_size: int = option(OCTETS, "50M", "Announced in SIZE; 0: no limit but the disk.")
    max_recipients: int = option(COUNT, "1000", "For one message; more get 452 4.5.3.", 1, 50000)
    min_free_space: int = option(OCTETS, "100M", "Below it new mail gets 452; queued mail still leaves.")
    max_connections: int = option(COUNT, "1000", "Clients at once; more get 421.", 1, 100000)
    max_connections_per_client: int = option(COUNT, "50", "For one IPv4 address or IPv6 /64; 0: no limit.")
    max_message_rate: int = option(COUNT, "0", "Messages a minute from one client; 0: no limit.")
    command_timeout: float = option(DURATION, "5m", "Idle time before 421; less under stress.", 1, 3600)
    trusted_clients: Networks = option(NETWORKS, "", "Networks free of the per-client limits.", none=())
    bare_newline: str = option(one_of("normalize", "reject"), "normalize", "Stray CR and LF; or reject.")
    greet_pause: float = option(DURATION, "0", "Wait before the banner; who speaks first must go.", 0, 60)
    odmr_listen: Endpoints = option(ODMR_LISTEN, "", "Where to serve ATRN, usually port 366.", none=())
    tls_certificate: str = option(parse_file, "", "PEM files; with both, STARTTLS is offered.  They are "
                                  "reread when they change; with user set, that account must be able to.")
    tls_key: str = option(parse_file, "", "")
    bounces_route: Route = option(parse_route, "mx", "How notices leave: mx, or a smarthost host[:port].")
    bounces_username: str = option(parse_login, "", "AUTH at the smarthost, only over TLS.")
    bounces_password: str = option(parse_login, "", "The password, or file:PATH.", paths=("file:",))
    bounces_postmaster: str = option(parse_mail_address, "", "Gets notices that could not be delivered.")
    status_listen: Optional[Endpoint] = option(     # no port is usual for it, so one must be named
        lambda text: parse_listener(text, -1)[0], "", "Address of the status page: 127.0.0.1:8025; "
        "a bare port means all of IPv4, [::]:8025 both.", none=None)
    status_token: str = option(str, "", "Asked as bearer token or as basic-auth password when set.  Mail is "
                               "shown only with it, or with a domain's own.")
    alerts_mail: str = option(
        parse_mail_address, "", "Who is told when a primary goes down, comes back, or rejects after coming "
        "back, and when mail, the disk or the certificate nears its end.")
    alerts_mail_route: Route = option(parse_route, "mx", "How that mail leaves: mx, or host[:port].")
    alerts_command: str = option(str, "", "Run at the same times.")
    alerts_webhook: str = option(URL, "", "Gets the same as a JSON POST.")
    alerts_after: float = option(DURATION, "5m", "An outage is told when it is so long.", 0, WEEK_S)

    def domain(self, name: str) -> Optional[DomainConfig]:
        """The section that serves `name`: its own, or the nearest `.parent`."""
        found = self.domains.get(name)
        while found is None and name:
            name = name.partition(".")[2]
            found = self.domains.get("." + name)
        return found

    @property
    def first_domain(self) -> str:
        """Where `<postmaster>` goes."""
        return next((name for name in self.domains if name[0] != "."), "")

    @functools.cached_property
    def has_logins(self) -> bool:
        """Whether anybody could pass AUTH, so that it is worth offering."""
        return any(cfg.username for cfg in self.domains.values())

    def is_trusted(self, address: str) -> bool:
        return is_within(address, self.trusted_clients)

    def is_owned(self, name: str, username: str) -> bool:
        """Whether `name` is served, for the customer who authenticated as `username`."""
        cfg = self.domain(name)
        return cfg is not None and cfg.username == username != ""


def is_within(address: str, networks: Sequence[Network]) -> bool:
    return any(parse_address(address) in network for network in networks)


SECTIONS = ("relay", "tls", "bounces", "status", "alerts", "defaults")


def _list_options(kind: Any, home: str) -> Iterator[Tuple[Tuple[str, str], Option]]:
    """By section and name.  A field is called section_name; or `name` alone, in the section `home`."""
    for field in dataclasses.fields(kind):
        section, _, name = field.name.partition("_")
        if field.metadata:
            place = (section, name) if section in SECTIONS and name else (home, field.name)
            yield place, field.metadata["option"]


OPTIONS = dict([*_list_options(Config, "relay"), *_list_options(DomainConfig, "domain")])


def parse_config(text: str, file: str) -> Config:
    """`hostname` stays empty where none is given.  Raises ConfigError at the first fault."""
    parser = _Parser(file)
    parser.read(text)
    return parser.build()


Given = Dict[str, Tuple[Any, int]]      # the options of a section: value and line


class _Parser:
    def __init__(self, file: str) -> None:
        self.file, self.folder = file, os.path.dirname(os.path.abspath(file))
        self.sections: Dict[str, Given] = collections.defaultdict(dict)

    def fault(self, line: int, text: str) -> ConfigError:
        return ConfigError(self.file, line, text)

    def read(self, text: str) -> None:
        """configparser keeps no line numbers, so each line is given its own as an ending: NUL and the
        number, which come out with the value, or with the name of a section."""
        parser = configparser.ConfigParser(interpolation=None, default_section="")
        parser.SECTCRE = re.compile(r"\[(?P<header>[^]]+\]\s*(?:[#;].*)?\0[0-9]+)$")
        lines = map(str.rstrip, text.lstrip("\ufeff").split("\n"))      # that is the mark of Windows editors
        try:
            parser.read_string("\n".join(line and "%s\0%d" % (line, at) for at, line in enumerate(lines, 1)))
        except configparser.DuplicateOptionError as error:
            raise self.fault(error.lineno or 0, "option '%s' is there twice" % error.option) from None
        except configparser.MissingSectionHeaderError as error:
            raise self.fault(error.lineno, "an option before the first [section]") from None
        except configparser.ParsingError as error:
            raise self.fault(error.errors[0][0], "not [section], option = value, or comment") from None
        for header in parser.sections():
            name, line = " ".join(header.partition("]")[0].split()), int(header.rpartition("\0")[2])
            try:
                section = "domain " + parse_served(name[7:]) if name.startswith("domain ") else name
            except ValueError as error:
                raise self.fault(line, "[%s]: %s" % (name, error)) from None
            if section in self.sections:
                raise self.fault(line, "section [%s] is there twice" % section)
            if section not in SECTIONS and not section.startswith("domain "):
                hint = _meant(name.lower(), dict.fromkeys([*SECTIONS, "domain NAME"], ""))
                raise self.fault(line, "unknown section [%s]%s" % (name, hint))
            given = self.sections[section]
            for key, value in parser.items(header):
                given[key] = self.option(section, key, value)

    def option(self, section: str, key: str, value: str) -> Tuple[Any, int]:
        """The value of an option, and its line."""
        home = "domain" if section == "defaults" else section.partition(" ")[0]
        parts = [line.rpartition("\0") for line in value.split("\n") if line]
        texts, line = [part.strip() for part, _, _ in parts], int(parts[0][2])
        row = OPTIONS.get((home, key))
        if row is None:
            places = {name: " in [%s]" % where for where, name in OPTIONS}
            places.update((name, "") for where, name in OPTIONS if where == home)
            raise self.fault(line, "unknown option '%s'%s" % (key, _meant(key, places)))
        if row.parse not in (str, parse_login):
            texts = [re.sub(r"(?:^|\s)[#;].*", "", text).strip() for text in texts]
        if len(parts) > 1 and not isinstance(row.parse, ListOf):
            raise self.fault(int(parts[1][2]), "this line, indented, goes on with '%s'" % key)
        try:
            return row.read(" ".join(filter(None, texts)), self.folder), line
        except ValueError as error:
            raise self.fault(line, "%s: %s" % (key, error)) from None

    def build(self) -> Config:
        flat: Dict[str, Any] = {"spool": os.path.join(self.folder, "spool")}
        for section in SECTIONS[:-1]:
            for key, (value, _) in self.sections[section].items():
                flat[key if section == "relay" else "%s_%s" % (section, key)] = value
        self.check_pair(self.sections["tls"], "certificate", "key")
        self.check_pair(self.sections["bounces"], "username", "password")
        domains: Dict[str, DomainConfig] = {}
        passwords: Dict[str, str] = {}
        names = [name[7:] for name in self.sections if name.startswith("domain ")]
        for name in [*flat.pop("domains", ()), *names]:
            given = {**self.sections["defaults"], **self.sections.get("domain " + name, {})}
            self.check_pair(given, "username", "password")
            domains[name] = one = self.domain(name, given)
            if passwords.setdefault(one.username, one.password) != one.password:    # who came to AUTH?
                raise self.fault(given["password"][1], "this username has another password elsewhere")
        flat.update(domains=domains, defaults=self.domain("", self.sections["defaults"]))
        return Config(self.file, **flat)

    def check_pair(self, given: Given, *pair: str) -> None:
        for one, other in (pair, pair[::-1]):
            if given.get(one, ("", 0))[0] and not given.get(other, ("", 0))[0]:
                raise self.fault(given[one][1], "%s needs %s beside it" % (one, other))

    def domain(self, name: str, given: Given) -> DomainConfig:
        """Where retry_interval alone is set, it may be longer than the default of max_retry_interval."""
        cfg = DomainConfig(name, **{key: value for key, (value, _) in given.items()})
        if "retry_interval" not in given or cfg.max_retry_interval >= cfg.retry_interval:
            return cfg
        if "max_retry_interval" in given:
            line = given["max_retry_interval"][1]
            raise self.fault(line, "max_retry_interval is smaller than retry_interval")
        return dataclasses.replace(cfg, max_retry_interval=cfg.retry_interval)


def _meant(word: str, known: Mapping[str, str]) -> str:
    """`known`: words, and what is said behind each."""
    near = difflib.get_close_matches(word, known, 1, 0.6)
    return " (did you mean '%s'%s?)" % (near[0], known[near[0]]) if near else ""


def parse_recipients(text: str) -> Tuple[FrozenSet[str], List[int]]:
    """The text of a recipients file: its addresses (as Path.key has them) and `@domain`s; and the numbers of
    lines that hold neither.  In Postfix's maps, too, all behind the first blank is ignored."""
    found, wrong = set(), []
    for number, line in enumerate(map(str.strip, text.lstrip("\ufeff").split("\n")), 1):
        if line[:1] in ("", "#"):
            continue
        match = re.match(r'(?:"(?:[^"\\]|\\.)*")?[^\s@]*@[^\s#]*', line)
        word = match.group() if match else "@"
        try:
            found.add("@" + parse_domain(word[1:]) if word[0] == "@" else parse_key(word))
        except (ValueError, Refuse):
            wrong.append(number)
    return frozenset(found), wrong


def is_listed(path: Path, entries: FrozenSet[str]) -> bool:
    return path.key in entries or "@" + path.domain in entries


# == 5. LOG ====================================================================
# The only writer to stderr, syslog or the log file, used by the loop alone, so the lines of
# one message keep their order.  Keeps the last notable lines for the status page.  Uses 2
# LIMITS and 3 GRAMMAR.

LEVELS = {"debug": 0, "info": 1, "warning": 2, "error": 3}
NOTABLE = ("primary", "flush", "master")        # services that tell of more than one message


def describe(error: Exception) -> str:
    """With the name of the file that it is about."""
    text, file = getattr(error, "strerror", None) or str(error), getattr(error, "filename", None)
    return "%s: %s" % (file, text) if file else text


def short_name(hostname: str) -> str:
    return hostname.partition(".")[0] or "localhost"


class Log:
    """Lines are gathered and written once a turn of the loop."""

    def __init__(self, where: str, level: str, hostname: str) -> None:
        self.where, self.level, self.host = where, LEVELS[level], short_name(hostname)
        self.pid, self.service = os.getpid(), ""        # whose tag the next line to syslog gets
        self.lines: List[str] = []
        self.second, self.stamp = -1, ""        # of the last line
        self.file: Optional[TextIO] = None
        self.kept: Dict[str, Deque[Tuple[Time, str, str, str]]] = {}    # by service: none crowds out another
        self.reopen()

    @property
    def notable(self) -> List[Tuple[Time, str, str, str]]:
        """The last lines that the status page shows, oldest first: time, service, text, level."""
        return sorted(itertools.chain(*self.kept.values()))[-NOTABLE_MAX:]

    def reopen(self, where: str = "") -> None:
        """After a rotation, or to go on elsewhere.  Raises OSError and leaves the old one in use."""
        self.flush()
        where, new = where or self.where, None
        if where == "syslog" and syslog is None:
            raise OSError("this Python has no syslog module")
        if where not in ("stderr", "syslog"):       # addresses of people are in it: not for everybody
            new = open(where, "a", encoding="utf-8", errors="backslashreplace",
                       opener=lambda path, flags: os.open(path, flags, 0o640))
        if self.file:
            self.file.close()
        self.where, self.file, self.service = where, new, ""

    def write(self, service: str, text: str, level: str = "info") -> None:
        """One event.  Foreign parts of `text` must have been through printable()."""
        now = time.time()
        if level in ("warning", "error") or (level == "info" and service in NOTABLE):
            lines = self.kept.setdefault(service, collections.deque(maxlen=NOTABLE_MAX // 2))
            lines.append((now, service, text[:LOG_TEXT_MAX], level))
        if LEVELS[level] < self.level:
            return
        text = "%s: %s" % (level, text) if level in ("warning", "error") else text
        if self.where != "syslog":
            if int(now) != self.second:
                self.second, self.stamp = int(now), time.strftime("%b %e %H:%M:%S", time.localtime(now))
            self.lines.append("%s %s etrn_relay/%s[%d]: %s\n" % (
                self.stamp, self.host, service, self.pid, text))
            return
        if service != self.service:
            self.service = service
            syslog.openlog("etrn_relay/" + service, syslog.LOG_PID, syslog.LOG_MAIL)
        priority = {"debug": syslog.LOG_DEBUG, "info": syslog.LOG_INFO, "warning": syslog.LOG_WARNING}
        syslog.syslog(priority.get(level, syslog.LOG_ERR), text.replace("\0", " "))

    def bug(self, error: BaseException) -> None:
        """A traceback on one line.  The caller drops the session or delivery at fault."""
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        self.write("master", "bug: " + printable(text, 4000), "error")

    def flush(self) -> None:
        lines, self.lines = self.lines, []
        target = self.file or sys.stderr        # None when it was closed before the start
        if lines and target is not None:
            with contextlib.suppress(OSError, ValueError):      # a full log disk or a closed terminal
                target.write("".join(lines))                    # must not stop the mail
                target.flush()


# == 6. LOOP ===================================================================
# The only select().  Owns sockets, timers and short-lived threads, and nothing of
# the mail.  Three rules hold in the whole file: state is touched in the loop
# alone; what is asked of the spool about a message is done in that order; what crosses a border
# between threads is data.

class Now(NamedTuple):
    """Both clocks, read once a turn: monotonic for pauses, wall for what people and other hosts see."""
    mono: float
    wall: Time

    def to_wall(self, mono: float) -> Time:
        return self.wall + mono - self.mono


class Loop:
    """Calls what is ready, one after the other.  Nothing it calls may wait."""

    def __init__(self, bug: Callable[[BaseException], None]) -> None:
        self.bug = bug                  # gets what nobody expected; the step it came from is over
        self.selector = selectors.DefaultSelector()
        self.now = Now(time.monotonic(), time.time())
        self.timers: List[Tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.posted: Deque[Tuple[Callable[..., Any], Tuple[Any, ...]]] = collections.deque()
        self.is_woken = False
        self.todo: Deque[Tuple[Callable[[], Any], Callable[[Any], None]]] = collections.deque()
        self.threads = 0
        self.reader, self.writer = socket.socketpair()
        for sock in (self.reader, self.writer):
            sock.setblocking(False)
        self.selector.register(self.reader, selectors.EVENT_READ, lambda mask: self.reader.recv(4096))

    def post(self, call: Callable[..., Any], *values: Any) -> None:
        """From any thread or signal handler: call it in the loop."""
        self.posted.append((call, values))
        if not self.is_woken:
            self.is_woken = True
            with contextlib.suppress(OSError):      # full: it will wake; closed: nobody is there
                self.writer.send(b"\0")

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        heapq.heappush(self.timers, (self.now.mono + seconds, next(self.order), call))

    def in_thread(self, work: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """For what may wait.  `then` gets the result or the exception, in the loop."""
        self.todo.append((work, then))
        self._start_threads()

    def _start_threads(self) -> None:
        while self.todo and self.threads < THREADS_MAX:
            work, then = self.todo[0]
            try:
                threading.Thread(target=self._run, args=(work, then), name="helper", daemon=True).start()
                self.threads += 1
            except RuntimeError as error:
                if self.threads:
                    return              # the system has no more: one that ends makes room
                self.post(then, OSError(errno.EAGAIN, str(error)))
            self.todo.popleft()

    def _run(self, work: Callable[[], Any], then: Callable[[Any], None]) -> None:
        try:
            result = work()
        except Exception as error:
            result = error
        self.post(self._end_thread, then, result)

    def _end_thread(self, then: Callable[[Any], None], result: Any) -> None:
        self.threads -= 1
        self._start_threads()
        then(result)

    def turn(self, longest: Optional[float] = None) -> None:
        """Wait, `longest` seconds at most, then read the clocks once and do all there is."""
        pause = longest
        if self.timers:
            left = max(0.0, self.timers[0][0] - time.monotonic())
            pause = left if pause is None else min(left, pause)
        events = self.selector.select(0.0 if self.posted else pause)
        self.now = Now(time.monotonic(), time.time())
        for key, mask in events:
            self.guard(key.data, mask)
        self.is_woken = False           # before the posts are read: what comes later wakes again
        for _ in range(len(self.posted)):
            call, values = self.posted.popleft()
            self.guard(call, *values)
        while self.timers and self.timers[0][0] <= self.now.mono:
            self.guard(heapq.heappop(self.timers)[2])

    def guard(self, call: Callable[..., Any], *values: Any) -> None:
        """A bug costs the step it is in, never the loop."""
        try:
            call(*values)
        except Exception as error:
            self.bug(error)

    def close(self) -> None:
        self.selector.close()
        self.reader.close()
        self.writer.close()


# What a socket raises that cannot go on now: the selector tells when it can.
WANTS: Tuple[Type[BaseException], ...] = (BlockingIOError, InterruptedError)
if ssl is not None:
    WANTS += (ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Stream:
    """A socket of the loop, plain or TLS: a client, a primary, a command or a browser.  Octets that
    come go to on_data().  on_end() is called once, when the peer sends no more: with "" at its end,
    else with the error, and then the socket is closed.  on_closed() is called once, however that came."""
    __slots__ = ("loop", "sock", "on_data", "on_end", "on_closed", "on_sent", "out", "mask", "moved",
                 "piece", "is_paused", "is_ended", "is_closing", "is_closed", "handshake")

    def __init__(self, loop: Loop, sock: socket.socket, on_data: Callable[[bytes], None],
                 on_end: Callable[[str], None]) -> None:
        sock.setblocking(False)
        self.loop, self.sock, self.on_data, self.on_end = loop, sock, on_data, on_end
        self.on_closed: Callable[[], None] = lambda: None
        self.on_sent: Optional[Callable[[], None]] = None       # called once, when all is out
        self.out = bytearray()
        self.mask = 0                   # as the selector knows
        self.moved = loop.now.mono      # when octets last went either way
        self.piece = RECEIVE_OCTETS     # read at a time
        self.is_paused = self.is_ended = self.is_closing = self.is_closed = False
        self.handshake: Optional[Callable[[], None]] = None
        self._watch()

    def send(self, data: bytes) -> None:
        self.out += data
        self._push()

    def pause(self, is_paused: bool) -> None:
        """Read no more for now: the relay or the peer is behind."""
        self.is_paused = is_paused
        if self.handshake is None:
            self._watch()
            self._read_on()

    def secure(self, context: Callable[[], "ssl.SSLContext"], then: Callable[[], None]) -> None:
        """STARTTLS as server, once our 220 has gone out in the clear."""
        def wrap() -> None:
            self._watch(0)
            try:
                self.sock = context().wrap_socket(self.sock, server_side=True, do_handshake_on_connect=False)
            except (OSError, ValueError) as error:      # the client has left
                return self._fail(str(error))
            self.handshake = then
            self._shake()
        self.handshake = lambda: None   # nothing is read before the handshake
        self.on_sent = wrap
        self._push()

    def _shake(self) -> None:
        try:
            self.sock.do_handshake()            # type: ignore[attr-defined]
        except WANTS as want:
            writes = ssl is not None and isinstance(want, ssl.SSLWantWriteError)
            return self._watch(selectors.EVENT_WRITE if writes else selectors.EVENT_READ)
        except (OSError, ValueError) as error:
            return self._fail("TLS handshake failed: %s" % printable(str(error), 200))
        then, self.handshake = self.handshake, None
        self.moved = self.loop.now.mono
        self._watch()
        if then is not None:
            then()

    def finish(self, linger: bool = True) -> None:
        """Close when all has gone out.  `linger`: and the peer has closed, because a reset would take
        our last words away; LINGER_S without progress are enough."""
        if not self.is_closing:
            self.is_closing = True
            self.on_data = lambda data: None
            self.on_sent = self._say_end if linger and not self.is_ended else self.close
            self._push()
            if not self.is_closed:
                self.loop.later(LINGER_S, self._expire)

    def _expire(self) -> None:
        if self.out and self.loop.now.mono - self.moved < LINGER_S:
            self.loop.later(LINGER_S, self._expire)
        else:
            self.close()

    def _say_end(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            if ssl is not None and isinstance(self.sock, ssl.SSLSocket):
                self.sock.unwrap()      # sends our close_notify; theirs is not waited for
        with contextlib.suppress(OSError):      # SSLSocket's own would drop the TLS that still reads
            socket.socket.shutdown(self.sock, socket.SHUT_WR)
        if self.is_ended:
            self.close()

    def close(self) -> None:
        if not self.is_closed:
            self.detach().close()
            self.on_closed()

    def detach(self) -> socket.socket:
        """The socket leaves the loop, for a thread."""
        self._watch(0)
        self.is_closed = self.is_closing = True
        return self.sock

    def _ready(self, mask: int) -> None:
        if self.is_closed:
            return                      # by another step of this turn
        if self.handshake is not None and self.on_sent is None:
            return self._shake()
        if mask & selectors.EVENT_WRITE:
            self._push()
        if not mask & selectors.EVENT_READ or self.is_closed or self.is_ended or self.is_paused:
            return
        try:
            data = self.sock.recv(self.piece)
        except WANTS:
            return
        except (OSError, ValueError) as error:
            return self._fail(getattr(error, "strerror", "") or str(error))
        self.moved = self.loop.now.mono
        if data:
            self._read_on()
            return self.on_data(data)
        self.is_ended = True
        self._watch()
        if not self.is_closing:
            self.on_end("")
        elif not self.out:
            self.close()

    def _read_on(self) -> None:
        """The selector does not know of what lies in the TLS layer."""
        is_tls = ssl is not None and isinstance(self.sock, ssl.SSLSocket)
        if is_tls and not self.is_paused and self.sock.pending():       # type: ignore[attr-defined]
            self.loop.post(self._ready, selectors.EVENT_READ)

    def _push(self) -> None:
        try:
            while self.out and not self.is_closed:
                del self.out[:self.sock.send(self.out)]
                self.moved = self.loop.now.mono
        except WANTS:
            pass
        except (OSError, ValueError):
            self.out.clear()            # what the peer said before can still be read; the end comes with that
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self.sock, socket.SHUT_WR)       # nothing may follow a hole
            if self.is_ended or self.is_closing:
                return self.close()
        if not self.out and self.on_sent is not None:
            then, self.on_sent = self.on_sent, None
            then()
        elif not self.is_closed:
            self._watch()

    def _fail(self, why: str) -> None:
        is_news = not (self.is_closing or self.is_ended)
        self.is_ended = True
        if is_news:
            self.on_end(why)
        self.close()

    def _watch(self, mask: Optional[int] = None) -> None:
        """Tell the selector what we wait for: `mask`, or what our state says."""
        if mask is None:
            is_reading = not (self.is_paused or self.is_ended or self.handshake is not None)
            mask = selectors.EVENT_READ * is_reading | selectors.EVENT_WRITE * bool(self.out)
        if mask != self.mask and not self.is_closed:
            if not mask:
                self.loop.selector.unregister(self.sock)
            elif self.mask:
                self.loop.selector.modify(self.sock, mask, self._ready)
            else:
                self.loop.selector.register(self.sock, mask, self._ready)
            self.mask = mask


# == 7. SPOOL ==================================================================
# Owns every file below the spool directory but the control socket.  Runs in the spool's
# own process.  The loop itself calls what does not wait for long: free(), remove_control()
# and, at a start, what reads state files.
# Uses 2 LIMITS, 3 GRAMMAR, 6 LOOP.
# Commit point: the rename of the sidecar, the second one in Spool._enter().  It is durable after
# the fsync of the directory that follows in Spool.commit(), and only then answered with 250.
# On a full disk new mail gets 452 and leaves nothing behind.  Queued mail goes on: a delivered
# message leaves by renaming its sidecar, or by unlinking it.  What must be written (recipients
# that are done, notices) is tried every 5 s; what a deferral taught is forgotten.  With
# UNRECORDED_MAX outcomes unwritten nothing more is sent, as a crash would send it again.
#
#   files in   SPOOL/       incoming/     what it is, and what a start does with it
#   S1         -            .eml          being received                  delete
#   S2         -            .eml .json    written, not renamed            delete
#   S3         .eml         .json         coming, and not acknowledged, or going, and finished: delete both
#   S4         .eml .json   -             queued                          load
#   S5         .eml .json   .new          sidecar being replaced          load, delete .new
#   S6         .eml         -             a stranger, or a disk's fault   corrupt/, once it is an hour old
#   S7         .json        -             its body is gone                corrupt/
#
# All files are opened relative to the directory that was locked.  Before new mail
# is stored the path must still lead there, and be writable: mail that no next start
# would find is not taken.

FORMAT = 2                      # of the sidecar; 1 held several domains, and is split when it is loaded
QUEUED, DELIVERED, BOUNCED, EXPIRED, DELETED = "queued", "delivered", "bounced", "expired", "deleted"
_ID = re.compile(r"[0-9A-F]{6,23}")     # a message of version 0.1 had 20 at most; its parts have 3 more
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SICK = (errno.EIO, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ESTALE)    # the last three: unmounted
_REFUSED = (errno.EACCES, errno.EPERM)


class Corrupt(Exception):
    """A pair that cannot be trusted; its text says why.  It goes to corrupt/."""


class Gone(Corrupt):
    """The sidecar is not there: the message was delivered, or taken out by hand."""


class NotOurs(Exception):
    """A pair that may not be read, or that a newer version wrote.  It stays; the text says why."""


class SpoolBusy(Exception):
    """Another process holds the spool's lock."""


class Summary(NamedTuple):
    """What the loop needs of a sidecar."""
    id: str
    kind: str                   # mail, notice or alert
    domain: str
    size: int
    received: Time
    attempts: int
    next_attempt: Time
    is_held: bool
    is_delay_told: bool
    is_finished: bool           # no recipient is left; a crash came before its removal


@dataclasses.dataclass
class Incoming:
    """A message that is being received."""
    fd: int = -1
    size: int = 0
    digest: Any = dataclasses.field(default_factory=hashlib.sha256)
    error: Optional[OSError] = None


class SpoolFolder:
    """The directory of the queue: opening, small steps, reading.  Every method waits for the disk."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.root = self.lock_fd = -1
        self.identity = (0, 0)          # of the directory: device and inode

    def open(self, is_relay: bool = True) -> None:
        """Create what is missing, take the lock, remove what was never acknowledged.  Raises SpoolBusy or
        OSError."""
        os.makedirs(self.path, 0o700, exist_ok=True)
        self.open_to_read()
        self.lock_fd = os.open("lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=self.root)
        self._lock("%d\n" % os.getpid() if is_relay else "%d command\n" % os.getpid())
        found = os.fstat(self.root)
        self.identity = found.st_dev, found.st_ino
        with self._durable():
            for folder in ("incoming", "corrupt"):
                self._make_folder(folder)
            self.sweep()
        with contextlib.suppress(PermissionError):      # not ours, and so not made by us
            fd = os.open(os.path.dirname(os.path.realpath(self.path)), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)            # the spool directory itself may be new
            finally:
                os.close(fd)

    def _lock(self, name: str) -> None:
        """A command ends soon and is waited for.  A relay, whose name is a bare number, is not; but one that
        was killed has left its spool's process behind, which ends when it has done what it was asked."""
        end = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(self.lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
            holder = os.pread(self.lock_fd, 40, 0).decode("ascii", "replace").strip()
            if (holder.isdigit() and is_alive(int(holder))) or time.monotonic() >= end:
                raise SpoolBusy("%s is in use by process %s" % (self.path, printable(holder) or "unknown"))
            time.sleep(LOCK_POLL_S)
        with contextlib.suppress(OSError):      # a full disk must not keep queued mail from leaving
            os.ftruncate(self.lock_fd, 0)
            os.pwrite(self.lock_fd, name.encode("ascii"), 0)

    def open_to_read(self) -> None:
        """Without the lock, for a command that looks at the files beside the running relay."""
        self.root = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        for fd in (self.lock_fd, self.root):
            close_quietly(fd)
        self.root = self.lock_fd = -1

    def sweep(self) -> None:
        """What states S1, S2, S3 and S5 have beside a queued pair was never acknowledged, or is finished.
        done/ is where version 0.1 left finished files."""
        for folder in ("incoming", "done"):
            for name in sorted(os.listdir(os.path.join(self.path, folder))) if self.has(folder) else []:
                id, _, kind = name.partition(".")
                if not _ID.fullmatch(id) or kind not in ("eml", "json", "new"):
                    continue            # not ours; people keep odd things everywhere
                with contextlib.suppress(OSError):      # a folder of that name, or a disk at fault
                    if kind == "json" and not self.has(id + ".json"):
                        self._unlink(id + ".eml")
                    self._unlink("%s/%s" % (folder, name))
        with contextlib.suppress(OSError):
            os.rmdir("done", dir_fd=self.root)

    def has(self, name: str) -> bool:
        """Raises OSError when the disk does not say."""
        try:
            os.lstat(name, dir_fd=self.root)
        except FileNotFoundError:
            return False
        return True

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.root)

    def _rename(self, name: str, target: str) -> None:
        os.rename(name, target, src_dir_fd=self.root, dst_dir_fd=self.root)

    def _make_folder(self, name: str) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=self.root)

    def _create(self, name: str) -> int:
        return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self.root)

    @contextlib.contextmanager
    def _durable(self, folder: str = ".") -> Iterator[None]:
        """Names changed within are on stable storage after it.  The directory is opened before the
        first change, because the kernel tells an error once to each open file."""
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.root)
        try:
            yield
            os.fsync(fd)
            os.fstat(fd)                # XFS that has shut down lets a folder's fsync pass, and says EIO here
        finally:
            close_quietly(fd)           # nothing was written through it

    def check_path(self) -> None:
        """What a next start will find at the spool's path must be the directory we write to.  Raises
        OSError."""
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
            if (found.st_dev, found.st_ino) != self.identity:
                raise OSError(errno.ESTALE, "the spool directory is not the one that was opened")
            if os.fstatvfs(fd).f_flag & os.ST_RDONLY:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        finally:
            close_quietly(fd)

    def _open(self, name: str, what: str) -> Tuple[int, int]:
        """A queued file for reading, and its size.  Raises Corrupt when it is gone, NotOurs when it may not
        be read, and OSError when the disk is at fault."""
        try:                            # O_NONBLOCK: a FIFO would wait
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self.root)
        except OSError as error:
            if error.errno in _REFUSED:
                raise NotOurs("the %s may not be read: %s" % (what, error.strerror)) from None
            if error.errno == errno.ENOENT:
                raise (Gone if what == "sidecar" else Corrupt)("the %s is gone" % what) from None
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise Corrupt("the %s is not a file" % what) from None
            raise
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise Corrupt("the %s is not a file" % what)
        except (OSError, Corrupt):
            os.close(fd)
            raise
        return fd, found.st_size

    def _read_file(self, name: str, what: str, most: int) -> bytes:
        fd, size = self._open(name, what)
        try:
            return b"".join(blocks_of(fd, min(size, most)))
        finally:
            os.close(fd)

    def read_parts(self, id: str) -> List[Dict[str, Any]]:
        return parse_sidecar(self._read_file(id + ".json", "sidecar", SIDECAR_MAX), id)

    def read_sidecar(self, id: str) -> Dict[str, Any]:
        """Raises Corrupt, NotOurs, or OSError when the disk is at fault."""
        return self.read_parts(id)[0]

    def peek_sidecar(self, id: str) -> Dict[str, Any]:
        """For lists of what the relay has checked before: as it stands, and quickly.  Raises Corrupt,
        NotOurs, OSError."""
        try:
            return split_sidecar(json.loads(self._read_file(id + ".json", "sidecar", SIDECAR_MAX)))[0]
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise Corrupt("the sidecar cannot be read") from None

    def read(self, ids: Sequence[str]) -> List[Union[Tuple[Dict[str, Any], bytes], Exception]]:
        """For delivery: sidecars and bodies, verified by their SHA-256; of a large body the first
        BLOCK_OCTETS, and block() has the rest.  Stops early after READ_OCTETS."""
        out: List[Union[Tuple[Dict[str, Any], bytes], Exception]] = []
        octets = 0
        for id in ids:
            try:
                sidecar = self.read_sidecar(id)
                out.append((sidecar, self.verify(id, sidecar, BLOCK_OCTETS)))
                octets += min(sidecar["size"], BLOCK_OCTETS)
            except (Corrupt, NotOurs, OSError) as error:
                out.append(error)
            if octets >= READ_OCTETS:
                break
        return out

    def verify(self, id: str, sidecar: Mapping[str, Any], most: int) -> bytes:
        """The first `most` octets of a body, all of which has the SHA-256 of its sidecar.  Raises Corrupt,
        NotOurs, OSError."""
        digest, kept = hashlib.sha256(), b""
        fd, size = self._open(id + ".eml", "body")
        try:
            for block in blocks_of(fd, size):
                digest.update(block)
                if len(kept) < most:
                    kept = kept + block if kept else block
        finally:
            os.close(fd)
        if size != sidecar["size"] or digest.hexdigest() != sidecar["sha256"]:
            raise Corrupt("the body does not match its SHA-256")
        return kept[:most]

    def block(self, id: str, offset: int) -> bytes:
        """A part of a large body; empty at its end."""
        fd, _ = self._open(id + ".eml", "body")
        try:
            return os.pread(fd, BLOCK_OCTETS, offset)
        finally:
            os.close(fd)

    def stream(self, id: str) -> Iterator[bytes]:
        """A body in blocks, also when the message leaves the spool meanwhile.  Raises Corrupt, NotOurs,
        OSError."""
        fd, size = self._open(id + ".eml", "body")
        try:
            yield from blocks_of(fd, size)
        finally:
            close_quietly(fd)

    def look(self, id: str, what: str = "") -> Tuple[Dict[str, Any], bytes]:
        """For people and notices: a sidecar, and of the message nothing, its "header", or all of it,
        verified ("whole").  Raises Corrupt, NotOurs, OSError."""
        sidecar, data = self.read_sidecar(id), b""
        if what == "whole":
            data = self.verify(id, sidecar, sidecar["size"])
        elif what == "header":
            top = self._read_file(id + ".eml", "body", HEADER_SCAN_MAX)
            data = top.partition(b"\r\n\r\n")[0] + b"\r\n"
        return sidecar, data

    def list(self) -> Tuple[List[str], List[str]]:
        """IDs with a sidecar, oldest first, and those of bodies that have stood alone for an hour."""
        ids, alone = [], []
        fd = os.open(".", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.root)
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    id, _, kind = entry.name.partition(".")
                    if kind == "json" and _ID.fullmatch(id):
                        ids.append(id)
                    elif kind == "eml" and _ID.fullmatch(id):
                        with contextlib.suppress(OSError):      # just committed, or just removed
                            found = entry.stat(follow_symlinks=False)
                            changed = max(found.st_mtime, found.st_ctime)   # cp -p and rsync set mtime back
                            if not self.has(id + ".json") and time.time() - changed > ORPHAN_S:
                                alone.append(id)
        finally:
            close_quietly(fd)
        return sorted(ids, key=lambda id: (len(id), id)), alone

    def load(self, ids: Sequence[str], is_patient: bool = False) -> List[Union[List[Summary], Exception]]:
        """What the loop needs of queued messages; of one of version 0.1 the parts that convert() makes.
        `is_patient`: BlockingIOError for a pair that makes no sense and changed a moment ago, because
        it may still be being copied in."""
        out: List[Union[List[Summary], Exception]] = []
        for id in ids:
            try:
                parts = self.read_parts(id)
                fd, size = self._open(id + ".eml", "body")
                os.close(fd)
                if size != parts[0]["size"]:
                    raise Corrupt("the body has %d octets, not %d" % (size, parts[0]["size"]))
                out.append([summarize(part) for part in parts])
            except Corrupt as error:
                out.append(BlockingIOError(str(error)) if is_patient and self._is_young(id) else error)
            except (NotOurs, OSError) as error:
                out.append(error)
        return out

    def _is_young(self, id: str) -> bool:
        for kind in (".json", ".eml"):
            with contextlib.suppress(OSError):      # the other half decides
                changed = os.stat(id + kind, dir_fd=self.root).st_ctime     # cp -p sets the other times back
                if 0 <= time.time() - changed < COPY_S:
                    return True
        return False

    def load_state(self, name: str) -> Dict[str, Any]:
        """An unreadable state file costs only what was learned."""
        try:
            value = json.loads(self._read_file(name, "state", STATE_MAX))
            return value if isinstance(value, dict) else {}
        except (Corrupt, NotOurs, OSError, ValueError, RecursionError):
            return {}

    def free(self) -> int:
        """Octets an unprivileged writer may still use; 0 when the file system cannot say or is almost
        out of inodes."""
        try:
            found = os.fstatvfs(self.root)
        except OSError:
            return 0
        return found.f_bavail * found.f_frsize if found.f_favail > 100 or not found.f_files else 0

    def count_corrupt(self) -> int:
        """Messages in corrupt/: a body, or a sidecar without one."""
        try:
            names = os.listdir(os.path.join(self.path, "corrupt"))
        except OSError:
            return 0
        return len({name.rpartition(".")[0] for name in names if name.endswith((".eml", ".json"))})


class Spool(SpoolFolder):
    """The queue on disk, and how it changes."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.fsync_s = 0.0              # the quickest fsync of the last batch
        self.bodies: Dict[str, Incoming] = {}

    # -- accepting

    def append(self, id: str, data: bytes) -> Optional[OSError]:
        """Part of a message that is being received.  An error is kept for the commit."""
        body = self.bodies.setdefault(id, Incoming())
        try:
            if body.error is None:
                if body.fd < 0:
                    body.fd = self._create("incoming/%s.eml" % id)
                write_all(body.fd, data)
                body.digest.update(data)
                body.size += len(data)
        except OSError as error:
            body.error = error
        return body.error

    def discard(self, id: str) -> None:
        """A message that did not come to its end.  Nothing of it remains, as far as the disk lets us."""
        body = self.bodies.pop(id, None)
        if body is not None:
            close_quietly(body.fd)
        for kind in ("eml", "json"):
            with contextlib.suppress(OSError):      # the next start removes it
                self._unlink("incoming/%s.%s" % (id, kind))

    def commit(self, batch: Sequence[Tuple[str, bytes, List[Dict[str, Any]]]]) -> List[Optional[OSError]]:
        """Make messages durable together.  Each is an ID, the rest of its body, and its sidecars without size
        and SHA-256: one for each destination, the first with that ID.  Returns for each None, when it is
        on stable storage, or the error; then nothing of it remains, as far as the disk lets us."""
        try:
            self.check_path()
        except OSError as error:
            for id, _, _ in batch:
                self.discard(id)
            return [error] * len(batch)
        errors: Dict[str, Optional[OSError]] = {}
        fds: List[int] = []
        owners: List[str] = []          # of these
        # 1. Write all, then sync all: one fsync commits the journal for the others, too.
        for id, rest, sidecars in batch:
            problem, body = self.append(id, rest), self.bodies.pop(id)
            fds += [body.fd] if body.fd >= 0 else []
            try:
                if problem is not None:
                    raise problem
                start_writing(body.fd)
                for sidecar in sidecars:
                    whole = dict(sidecar, size=body.size, sha256=body.digest.hexdigest())
                    self._stage("incoming/%s.eml" % id, whole, fds)
                errors[id] = None
            except OSError as error:
                errors[id] = error
            owners += [id] * (len(fds) - len(owners))
        for id, problem in zip(owners, self._sync(fds)):
            errors[id] = errors[id] or problem
        # 2. Rename all, then sync the directory once.
        ready = [one for one in batch if errors[one[0]] is None]
        try:
            with self._durable() if ready else contextlib.nullcontext():
                for id, _, sidecars in ready:
                    errors[id] = self._enter(sidecars)
        except OSError as error:
            for id, _, _ in ready:
                errors[id] = errors[id] or error
        # 3. Take back what failed.  What did not get so far may have the ID of a queued message.
        entered = {id for id, _, _ in ready}
        for id, _, sidecars in batch:
            for sidecar in sidecars if errors[id] is not None else ():
                (self._withdraw if id in entered else self.discard)(sidecar["id"])
        return [errors[id] for id, _, _ in batch]

    def _stage(self, body: str, sidecar: Mapping[str, Any], fds: List[int]) -> None:
        """State S2, not synced.  `body`: the file that has it.  What must be synced is open in `fds`, after
        an error, too.  Raises OSError."""
        id, target = sidecar["id"], "incoming/%s.eml" % sidecar["id"]
        if self.has(id + ".json") or self.has(id + ".eml"):
            raise FileExistsError(errno.EEXIST, "queue ID in use", id)
        if body != target:
            self._link(body, target, fds)
        fds.append(self._create("incoming/%s.json" % id))
        write_all(fds[-1], format_sidecar(sidecar))
        start_writing(fds[-1])

    def _link(self, name: str, target: str, fds: List[int]) -> None:
        """A second name for a body; a copy where links do not exist."""
        try:
            return os.link(name, target, src_dir_fd=self.root, dst_dir_fd=self.root)
        except OSError as error:
            if error.errno in _FULL + (errno.EIO, errno.EROFS, errno.ENOENT):
                raise
        fds.append(self._create(target))
        source = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.root)
        try:
            for block in blocks_of(source, os.fstat(source).st_size):
                write_all(fds[-1], block)
        finally:
            close_quietly(source)

    def _sync(self, fds: Sequence[int]) -> List[Optional[OSError]]:
        """Also closes them.  A file whose fsync failed once is given up, never synced again: the kernel may
        call lost pages clean.  Where each fsync takes long, as on a card, many are under way at once: with
        a journal the first alone does."""
        times: List[float] = []
        results: List[Optional[OSError]] = []

        def sync_one(fd: int) -> Optional[OSError]:
            began = time.monotonic()
            try:
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)        # NFS reports a full disk here
            except OSError as error:
                return error
            times.append(time.monotonic() - began)
            return None
        while len(results) < len(fds) and self.fsync_s <= FAST_FSYNC_S:
            results.append(sync_one(fds[len(results)]))
            self.fsync_s = min(times) if len(times) > 1 else self.fsync_s
        results += beside(sync_one, fds[len(results):])
        self.fsync_s = min(times, default=0.0)
        return results

    def _enter(self, sidecars: Sequence[Dict[str, Any]]) -> Optional[OSError]:
        """The commit point of each destination's part is the second rename, that of the sidecar."""
        try:
            for sidecar in sidecars:
                self._rename("incoming/%s.eml" % sidecar["id"], sidecar["id"] + ".eml")
                self._rename("incoming/%s.json" % sidecar["id"], sidecar["id"] + ".json")
        except OSError as error:
            return error
        return None

    def _withdraw(self, id: str) -> None:
        """Undo an unacknowledged commit, back through S3, so that at no point a half stands alone."""
        with contextlib.suppress(OSError):
            self._rename(id + ".json", "incoming/%s.json" % id)
        with contextlib.suppress(OSError):
            if not self.has(id + ".json"):     # else both stay: a second copy, but whole
                self._unlink(id + ".eml")
        self.discard(id)

    # -- changing and removing

    def record(self, id: str, changes: Mapping[str, Any], people: Mapping[str, Mapping[str, Any]],
               notices: Sequence[Tuple[str, bytes, Dict[str, Any]]] = ()) -> bool:
        """Change a sidecar: fields of its own, and of its recipients by address.  Notices (ID, body,
        sidecar) are on stable storage before that: a crash between makes a second notice, never none.
        When no recipient is left queued the message leaves the spool.  True then.  Raises Corrupt,
        NotOurs or OSError."""
        try:
            sidecar = self.read_sidecar(id)
        except Corrupt:
            if not self.has("incoming/%s.json" % id) or self.remove([id])[0] is not None:
                raise
            return True                 # finished by a try before this one, all but the fsync
        for own, data, its in notices:
            error = self.commit([(own, data, [its])])[0] if not self.has(own + ".json") else None
            if error is not None:       # what an attempt before this one brought there stays there
                raise error
        sidecar.update(changes)
        for one in sidecar["recipients"]:
            one.update(people.get(one["address"], {}))
        if all(one["state"] != QUEUED for one in sidecar["recipients"]):
            error = self.remove([id])[0]
            if error is not None:
                raise error
            return True
        self._replace(id + ".json", "incoming/%s.new" % id, format_sidecar(sidecar))
        return False

    def shift(self, ids: Sequence[str], seconds: float) -> None:
        """The clock that told the times of these was wrong by so much.  Raises OSError."""
        for id in ids:
            with contextlib.suppress(Corrupt, NotOurs):         # delivered meanwhile
                sidecar = self.read_sidecar(id)
                shift_times(sidecar, seconds)
                self._replace(id + ".json", "incoming/%s.new" % id, format_sidecar(sidecar))

    def _replace(self, name: str, temporary: str, data: bytes) -> None:
        """The old content or the new one stands, whole.  Raises OSError."""
        try:
            self._unlink(temporary)
            fd = self._create(temporary)
            try:
                write_all(fd, data)
                os.fsync(fd)
            finally:
                os.close(fd)
            with self._durable():
                self._rename(temporary, name)
        except OSError:
            with contextlib.suppress(OSError):
                self._unlink(temporary)
            raise

    def remove(self, ids: Sequence[str]) -> List[Optional[OSError]]:
        """Messages that are finished.  The sidecars leave first and durably (S3), so that a power cut brings
        none back without its body."""
        results: Dict[str, Optional[OSError]] = {}
        try:
            with self._durable():
                for id in ids:
                    results[id] = self._take_out(id)
        except OSError as error:
            return [results.get(id) or error for id in ids]
        for id in ids:
            if results[id] is None:
                with contextlib.suppress(OSError):      # out of the queue all the same; the next start sweeps
                    self._unlink(id + ".eml")
                    self._unlink("incoming/%s.json" % id)
        return [results[id] for id in ids]

    def _take_out(self, id: str) -> Optional[OSError]:
        """On a full disk the sidecar goes at once.  A crash would then leave the body alone (S6), but a
        delivered message must not stay because the disk is full."""
        try:
            try:
                self._rename(id + ".json", "incoming/%s.json" % id)
            except OSError as error:
                if error.errno != errno.ENOENT and error.errno not in _FULL:
                    raise
                self._unlink(id + ".json")      # or somebody was quicker with rm
        except OSError as error:
            return error
        return None

    def set_aside(self, id: str, why: str) -> str:
        """Move what there is of a pair to corrupt/, durably there before it is gone here.  Returns the
        text for the log; raises OSError."""
        moved: List[str] = []
        self._make_folder("corrupt")    # people tidy up
        is_taken = self.has("corrupt/%s.json" % id) or self.has("corrupt/%s.eml" % id)
        name = "%s-%s" % (id, secrets.token_hex(4)) if is_taken else id
        with self._durable(), self._durable("corrupt"):
            for kind in (".json", ".eml"):
                with contextlib.suppress(FileNotFoundError):
                    self._rename(id + kind, "corrupt/%s%s" % (name, kind))
                    moved.append(id + kind)
        return "%s: corrupt: %s; moved to corrupt/: %s" % (id, why, " ".join(moved) or "nothing left of it")

    def convert(self, id: str) -> List[Summary]:
        """A sidecar of version 0.1 becomes one for each of its domains.  The first keeps the ID, and
        changes last: until then another try finds what is there already."""
        parts = self.read_parts(id)
        fresh = [part for part in parts[1:] if not self.has(part["id"] + ".json")]
        fds: List[int] = []
        try:
            for part in fresh:
                self.discard(part["id"])
                self._unlink(part["id"] + ".eml")       # of a try before: no rename replaces a link to itself
                self._stage(id + ".eml", part, fds)
        finally:
            problems = list(filter(None, self._sync(fds)))
        if problems:
            raise problems[0]
        # Bodies first, durably: no power cut leaves a sidecar without its body.
        for kind in ("eml", "json"):
            with self._durable():
                for part in fresh:
                    self._rename("incoming/%s.%s" % (part["id"], kind), "%s.%s" % (part["id"], kind))
        self._replace(id + ".json", "incoming/%s.new" % id, format_sidecar(parts[0]))
        return [summarize(part) for part in parts]

    # -- the rest

    def heal(self) -> bool:
        """Whether a probe file survives all that a message goes through."""
        try:
            self.check_path()
            for folder in ("incoming", "corrupt"):
                self._make_folder(folder)
            self._replace("probe", "incoming/probe", b"probe\n" * 1000)
            with self._durable():
                self._unlink("probe")
        except OSError:
            return False
        return True

    def save(self, name: str, value: Any) -> None:
        """state.json, recipients.json and history.json.  Raises OSError."""
        data = json.dumps(value, sort_keys=True).encode("ascii") + b"\n"
        self._replace(name, name.replace(".json", ".new"), data)

    def remove_control(self) -> None:
        """The control socket of a relay that is gone; we hold the lock, so it is not in use."""
        self._unlink("control")


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def write_all(fd: int, data: bytes) -> None:
    done = os.write(fd, data)
    while done < len(data):             # a short write is not an error, write(2)
        done += os.write(fd, memoryview(data)[done:])


def close_quietly(fd: int) -> None:
    """A file that is given up, or that nothing was written to."""
    with contextlib.suppress(OSError):  # closed all the same, close(2)
        if fd >= 0:
            os.close(fd)


def start_writing(fd: int) -> None:
    """The kernel begins to write the file, so that an fsync that comes later has less to wait for: what
    Linux makes of this advice, fadvise64(2).  Accepting is 2.6 times as fast for it where the file
    system has a journal."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def blocks_of(fd: int, size: int) -> Iterator[bytes]:
    """The first `size` octets of a file; a short read is not its end on every file system."""
    while size > 0:
        block = os.read(fd, min(size, BLOCK_OCTETS))
        if not block:
            break
        size -= len(block)
        yield block


def beside(call: Callable[[Any], Any], items: Sequence[Any]) -> List[Any]:
    """The results of calls that wait beside each other, each in a thread of its own."""
    results: Dict[int, Any] = {}

    def work(number: int, item: Any) -> None:
        results[number] = call(item)
    threads = []
    for pair in enumerate(items):
        threads.append(threading.Thread(target=work, args=pair, name="fsync", daemon=True))
        try:
            threads[-1].start()
        except RuntimeError:            # the system has no more
            threads.pop()
            work(*pair)
    for thread in threads:
        thread.join()
    return [results[number] for number in range(len(items))]


def shift_times(sidecar: Dict[str, Any], seconds: float) -> None:
    """The clock that told them was wrong by so much."""
    sidecar["received"] = max(0.0, sidecar["received"] + seconds)
    for one in sidecar["recipients"]:
        for key in ("expires", "next_attempt", "last_attempt", "refused_since"):
            if one[key]:
                one[key] = max(0.0, one[key] + seconds)


def format_sidecar(sidecar: Mapping[str, Any]) -> bytes:
    return json.dumps(sidecar, separators=(",", ":")).encode("ascii") + b"\n"


def parse_sidecar(data: bytes, id: str) -> List[Dict[str, Any]]:
    """Checks all that the relay relies on, so that nothing later raises; addresses go through the same
    grammar as on the wire.  One sidecar; of version 0.1 one for each domain.  Raises Corrupt or
    NotOurs."""
    try:
        sidecar = json.loads(data)
        version = sidecar["format"]
        if type(version) is int and version > FORMAT:
            raise NotOurs("the sidecar has format %d, this version reads %d" % (version, FORMAT))
        if version not in (1, FORMAT):
            raise Corrupt("the sidecar has format %s" % printable(str(version), 20))
        if sidecar["id"] != id:
            raise Corrupt("the sidecar is of another message")
        parts = split_sidecar(sidecar)
        for part in parts:
            check_sidecar(part)
        pack([[[parts]]])               # a RecursionError now, rather than in an answer that has them
        return parts
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, Refuse) as error:
        raise Corrupt("the sidecar cannot be read: %s" % printable(repr(error), 200)) from None


def check_sidecar(sidecar: Mapping[str, Any]) -> None:
    """Raises Corrupt, or what a value of a wrong type raises."""
    people, client = sidecar["recipients"], sidecar["client"]
    texts = [sidecar[key] for key in ("id", "domain", "sender", "sha256", "ret", "envid", "kind", "body")]
    texts += [client["address"], client["helo"], client.get("name", ""), client["tls"] or ""]
    counts, times = [sidecar["size"]], [sidecar["received"]]
    for one in people:
        texts += [one[key] for key in ("address", "state", "notify", "orcpt", "last_response",
                                       "last_status", "last_remote")]
        counts.append(one["attempts"])
        times += [one["next_attempt"], one["expires"]]
        times += [one[key] for key in ("last_attempt", "refused_since") if one[key] is not None]
        path, rest = parse_path("<%s>" % one["address"], "5.1.3")
        if rest or not path.domain or path.domain != sidecar["domain"]:
            raise Corrupt("the sidecar's recipient %s is not an address" % printable(one["address"], 100))
    if not (people and all(isinstance(one, str) for one in texts)
            and not CONTROLS.search("".join(texts).encode("utf-8"))         # a lone surrogate is a ValueError
            and all(type(one) is int and 0 <= one < 1 << 62 for one in counts)
            and all(type(one) in (int, float) and 0 <= one < TIME_MAX for one in times)     # no NaN, no flag
            and all(one["state"] in (QUEUED, DELIVERED, BOUNCED, EXPIRED, DELETED) for one in people)
            and type(sidecar["smtputf8"]) is bool and type(sidecar["held"]) is bool
            and re.fullmatch("[0-9a-f]{64}", sidecar["sha256"])
            and sidecar["kind"] in ("mail", "notice", "alert")
            and not parse_path("<%s>" % sidecar["sender"], "5.1.7")[1]):
        raise Corrupt("the sidecar does not make sense")


def split_sidecar(old: Dict[str, Any]) -> List[Dict[str, Any]]:
    """Format 1: recipients name their domains, and `held` lists those that are held.  The parts' IDs
    follow from the first one's, so that another try makes the same."""
    if old["format"] == FORMAT:
        return [old]
    domains = dict.fromkeys(one["domain"] for one in old["recipients"] if one["state"] == QUEUED)
    parts = []
    for number, domain in enumerate(domains or [old["recipients"][0]["domain"]]):
        people = [{key: value for key, value in one.items() if key != "domain"}
                  for one in old["recipients"] if one["domain"] == domain]
        held = domain in old["held"] or (old["kind"] != "mail" and bool(old["held"]))
        id = old["id"] + ("%02X" % number if number else "")
        parts.append(dict(old, format=FORMAT, id=id, domain=domain, held=held, recipients=people))
    return parts


def summarize(sidecar: Mapping[str, Any]) -> Summary:
    waiting = [one for one in sidecar["recipients"] if one["state"] == QUEUED]
    people = waiting or sidecar["recipients"]
    return Summary(
        sidecar["id"], sidecar["kind"], sidecar["domain"], sidecar["size"], sidecar["received"],
        max(one["attempts"] for one in people), min(one["next_attempt"] for one in people),
        sidecar["held"], any(one.get("delayed") for one in people), not waiting)


def make_sidecar(id: str, kind: str, domain: str, sender: str, recipients: Iterable[Tuple[str, str, str]],
                 now: Time, expires: Time, client: Mapping[str, Optional[str]], body: str = "",
                 smtputf8: bool = False, ret: str = "", envid: str = "") -> Dict[str, Any]:
    """Without size and SHA-256, which the spool fills in.  `recipients`: (address, NOTIFY, ORCPT)."""
    return {
        "format": FORMAT, "id": id, "kind": kind, "domain": domain, "received": now, "size": 0, "sha256": "",
        "sender": sender, "client": dict(client), "body": body, "smtputf8": smtputf8, "ret": ret,
        "envid": envid, "held": False,
        "recipients": [
            {"address": address, "state": QUEUED, "attempts": 0, "next_attempt": now, "expires": expires,
             "last_attempt": None, "last_status": "", "last_response": "", "last_remote": "",
             "refused_since": None, "notify": notify, "orcpt": orcpt}
            for address, notify, orcpt in recipients]}


def disk_reply(error: Optional[OSError]) -> Reply:
    """What a client hears when its message could not be kept: always temporary, and nothing of it remains."""
    if error is not None and error.errno in _FULL:
        return Reply(452, "4.3.1", "Insufficient system storage")
    return Reply(451, "4.3.0", "Local error in processing, try again later")


Asked = Tuple[int, str, Tuple[Any, ...]]        # its number, a method of Spool, and values for that
Returned = Tuple[int, Any]                      # ... and what that returned, or its exception


def pack(value: Any) -> bytes:
    """A frame between the relay and the spool's process."""
    data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    return len(data).to_bytes(8, "big") + data


class Frames:
    """Takes apart again what pack() made, however it arrives."""

    def __init__(self) -> None:
        self.held = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        self.held += data
        while len(self.held) >= 8:
            end = 8 + int.from_bytes(self.held[:8], "big")
            if len(self.held) < end:
                break
            value = pickle.loads(memoryview(self.held)[8:end])
            del self.held[:end]
            yield value


def do_one(spool: Spool, what: str, values: Sequence[Any]) -> Any:
    try:
        return getattr(spool, what)(*values)
    except (OSError, Corrupt, NotOurs) as error:
        return error
    except Exception:                   # a bug: its traceback does not pass a process's border by itself
        return RuntimeError("in the spool: " + traceback.format_exc())


def do_batch(spool: Spool, asked: Sequence[Asked]) -> List[Returned]:
    """Commits are done together, and so are removals.  Nothing overtakes what was asked of the same
    message."""
    out: List[Returned] = []
    together: Dict[str, List[Tuple[int, Any]]] = {"commit": [], "remove": []}
    ids: Set[str] = set()               # in these two

    def do_together() -> None:
        for what, batch in together.items():
            if batch:
                results = do_one(spool, what, [[value for _, value in batch]])
                if isinstance(results, Exception):      # all hear of it, none is told "done"
                    results = [results] * len(batch)
                out.extend(zip([number for number, _ in batch], results))
                batch.clear()
        ids.clear()
    for number, what, values in asked:
        if ids and (what == "shift" or values and values[0] in ids):
            do_together()
        if what in together:
            together[what].append((number, values if what == "commit" else values[0]))
            ids.add(values[0])
        else:
            out.append((number, do_one(spool, what, values)))
    do_together()
    return out


def serve_spool(spool: Spool, sock: socket.socket, most: int) -> None:
    """In the spool's process: do what is asked, `most` of what is pending as one batch, so that messages
    share their fsyncs.  When the relay has gone, what it asked before is still done."""
    frames, data = Frames(), b"?"
    asked: List[Asked] = []
    while data or asked:
        while data and len(asked) < most:
            try:
                data = sock.recv(RECEIVE_OCTETS, socket.MSG_DONTWAIT if asked else 0)
            except BlockingIOError:
                break
            except ConnectionResetError:        # it left answers unread, and questions, which come next
                continue
            for questions in frames.feed(data):
                asked += questions
        told, asked = do_batch(spool, asked[:most]), asked[most:]
        with contextlib.suppress(ConnectionError):      # nobody is there any more
            sock.sendall(pack(told))


def end_with_traceback() -> None:
    """Of the spool's process."""
    try:
        traceback.print_exc()
        sys.stderr.flush()              # 3.8 keeps it in a buffer
    finally:
        os._exit(EX_TEMPFAIL)


class SpoolProcess:
    """The spool as the loop sees it: it is asked with data and answers with data.  It stands in a
    process of its own, because two threads of one hinder each other: that accepts 1.4 times as many
    messages, for less processor time.  One thread there writes: for each message in the order in which
    it was asked.  Another reads beside it; who needs a change to be there waits for its answer."""
    READS = frozenset(("read", "block", "look", "list", "load"))

    def __init__(self, spool: Spool, loop: Loop) -> None:
        self.spool, self.loop, self.pid = spool, loop, 0
        self.sick = ""                  # why no new mail is taken, or empty
        self.may_write = True           # False for a command that only reads
        self.answered = loop.now.mono   # monotonic, of the last answer
        self.numbers = itertools.count()
        self.waiting: Dict[int, Callable[[Any], None]] = {}
        self.asked: Dict[bool, List[Asked]] = {True: [], False: []}      # in this turn: reads, and writes
        self.streams: Dict[bool, Stream] = {}
        self.on_lost: Callable[[str], None] = lambda why: None

    def start(self) -> None:
        """Before there are threads, which a fork would leave half."""
        pairs = {is_read: socket.socketpair() for is_read in self.asked}
        self.pid = os.fork()
        if not self.pid:
            try:
                self._serve(pairs[False][1], pairs[True][1])
            except BaseException:
                end_with_traceback()
        for is_read, (ours, theirs) in pairs.items():
            theirs.close()
            self.streams[is_read] = Stream(
                self.loop, ours, functools.partial(self._on_data, Frames()), self._on_end)

    def _serve(self, writes: socket.socket, reads: socket.socket) -> None:
        """The other process.  Signals are the relay's, and so are its sockets."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        with contextlib.suppress(OSError, ValueError):      # a reload may raise what the relay may have
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        # Few are open before the first client.  /dev/fd is not everywhere, and FreeBSD's names three.
        kept = sorted([0, 1, 2, self.spool.root, self.spool.lock_fd, writes.fileno(), reads.fileno(), 4096])
        for low, high in zip(kept, kept[1:]):
            os.closerange(low + 1, high)

        def work(sock: socket.socket, most: int) -> None:
            try:
                serve_spool(self.spool, sock, most)
            except BaseException:       # one without the other is of no use
                end_with_traceback()
        threading.Thread(target=work, args=(reads, 1), daemon=True).start()
        work(writes, BATCH_MAX)
        os._exit(EX_OK)

    def ask(self, then: Callable[[Any], None], what: str, *values: Any) -> None:
        """`then` gets what the method `what` of Spool returns, or its exception, in the loop; nothing
        where only reading is allowed."""
        is_read = what in self.READS
        if not is_read and not self.may_write:
            return                      # what is wrong with the spool is the relay's to mend
        number = next(self.numbers)
        self.waiting[number] = then
        if not self.asked[is_read]:
            self.loop.later(0.0, functools.partial(self._send, is_read))
        self.asked[is_read].append((number, what, values))

    def _send(self, is_read: bool) -> None:
        """All of a turn at once."""
        asked, self.asked[is_read] = self.asked[is_read], []
        self.streams[is_read].send(pack(asked))

    def _on_data(self, frames: Frames, data: bytes) -> None:
        for told in frames.feed(data):
            self._tell(told)

    def _tell(self, told: Iterable[Returned]) -> None:
        self.answered = self.loop.now.mono
        for number, result in told:
            if isinstance(result, OSError) and result.errno in _SICK:
                self.sick = result.strerror or str(result)
            self.loop.guard(self.waiting.pop(number), result)

    def _on_end(self, _: str) -> None:
        """Without it nothing can be kept: the relay ends as it did, at once.  No crash loses mail."""
        status = os.waitpid(self.pid, 0)[1]
        self.on_lost("the spool's process has ended: wait status %d" % status)
        if os.WIFSIGNALED(status):
            os.kill(os.getpid(), os.WTERMSIG(status))
        os._exit(EX_TEMPFAIL)

    def close(self) -> None:
        """It brings to its end what it was asked; only a disk that does not answer is not waited for."""
        for stream in self.streams.values():
            stream.close()
        if self.pid and not self.waiting:
            os.waitpid(self.pid, 0)


# == 8. SESSION ================================================================
# One client's SMTP dialogue: bytes in, actions out.  Pure; uses 2 LIMITS,
# 3 GRAMMAR and 4 CONFIG.  The server carries the actions out in their order.
# After Ask a session waits for resume(answer) and keeps later input in its buffer.

# A question for the server, which calls resume() with the answer:
# mail (Transaction), rcpt (Recipient)      None to accept, or a Reply that refuses
# login (Login)                             None when it is right, or a Reply
# commit (Transaction), etrn ([@]domain)    the Reply; 2xx to commit: the message is durable
# atrn (domains, none means all)            the Reply; 250 is followed by Reverse
# starttls (None)                           (protocol, cipher) after the handshake
Ask = NamedTuple("Ask", [("what", str), ("value", Any)])
Send = NamedTuple("Send", [("data", bytes)])
Body = NamedTuple("Body", [("data", bytes), ("transaction", "Transaction")])    # octets of a message
Discard = NamedTuple("Discard", [])             # the message will not be kept: its Body can go
Note = NamedTuple("Note", [("text", str)])      # for the log
# These two come into force when everything sent so far has gone out.  `at_once`: the
# client said QUIT, so no reset can overtake our last reply.  After ATRN the client is
# the server (RFC 2645 5.2.1) and the session is over; `early` came behind its command.
Close = NamedTuple("Close", [("at_once", bool)])
Reverse = NamedTuple("Reverse", [("early", bytes)])
Action = Union[Send, Body, Discard, Note, Ask, Reverse, Close]


# -- the octets of a message pass through these: DataReader, Newlines, Opening, Hops

class DataReader:
    """Undoes DATA's dot stuffing (RFC 5321 4.5.2) and finds the end of data.  Nothing
    but CRLF . CRLF is the end.  Any other dot that opens a line is dropped, also behind
    a bare LF, where clients like Python's smtplib stuff too.  So a lone dot between
    bare LFs leaves an empty line, never a line with a dot."""
    END = b"\r\n.\r\n"
    is_last = True
    TAILS = (END[:4], END[:3], END[:2], END[:1], b"\n")     # the end, or a dot behind an LF, may follow

    def __init__(self) -> None:
        self.held = b"\r\n"             # a virtual line end: a first line of "." is an end too
        self.virtual = 2                # octets of it that must be taken off again

    def feed(self, data: bytes) -> Tuple[bytes, Optional[bytes]]:
        """The octets of the message and, at its end, what follows it; else None."""
        data = self.held + data
        end = data.find(self.END)
        tail = next((len(tail) for tail in self.TAILS if data.endswith(tail)), 0)
        kept = len(data) - tail if end < 0 else end + 2
        rest, self.held = None if end < 0 else data[end + 5:], data[kept:]
        virtual = self.virtual if kept else 0
        self.virtual -= virtual
        return data[:kept].replace(b"\n.", b"\n")[virtual:], rest


class ChunkReader:
    """Takes the octets of a BDAT chunk, RFC 3030 2.  None of them is ever taken for a command."""

    def __init__(self, size: int, is_last: bool) -> None:
        self.left = size
        self.is_last = is_last

    def feed(self, data: bytes) -> Tuple[bytes, Optional[bytes]]:
        octets, rest = data[:self.left], data[self.left:]
        self.left -= len(octets)
        return octets, None if self.left else rest


class Newlines:
    """Mends what must never be sent on.  NUL goes first; then a bare LF becomes
    CRLF, and a bare CR a space."""
    _STRAY = re.compile(rb"\r(?!\n)|(?<!\r)\n")

    def __init__(self) -> None:
        self.held = b""                 # a final CR waits for its LF
        self.is_open = False            # the last line has no end yet
        self.found = False              # there was something to mend

    def feed(self, data: bytes, is_last: bool) -> bytes:
        """`is_last`: no more comes.  A line without end, as BDAT may leave one, gets its end."""
        self.found |= b"\0" in data
        data = self.held + data.replace(b"\0", b"")
        self.held = b"\r" if data.endswith(b"\r") and not is_last else b""
        data = data[:len(data) - len(self.held)]
        pairs = data.count(b"\r\n")
        if data.count(b"\n") != pairs or data.count(b"\r") != pairs:
            data, self.found = self._STRAY.sub(lambda m: b" " if m.group() == b"\r" else b"\r\n", data), True
        self.is_open = not data.endswith(b"\r\n") if data else self.is_open
        return data + b"\r\n" if is_last and self.is_open else data


class Opening:
    """Mends the first lines of a message.  One that begins with a blank would join our
    Received field: an empty line goes before it.  An mbox line would end the header
    before it begins: it becomes a field, as with Postfix."""
    LINES = (b"From ", b">From ")

    def __init__(self) -> None:
        self.held = b""                 # the start of a line, too short to be judged
        self.within = False             # ... an mbox line
        self.left = MAILBOX_LINES_MAX   # 0: what comes now is like any other text

    def feed(self, data: bytes) -> bytes:
        out, data, self.held = b"", self.held + data, b""
        while data and self.left:
            if self.within:
                line, newline, data = data.partition(b"\n")
                out += line + newline
                self.within = not newline
            elif data.startswith(self.LINES):
                out += b"X-Mailbox-Line: "
                self.within, self.left = True, self.left - 1
            elif any(line.startswith(data) for line in self.LINES):
                self.held, data = data, b""
            else:
                out += b"\r\n" if data[:1] in (b" ", b"\t") else b""
                self.left = 0
        return out + data


class Hops:
    """Counts the Received fields while the header passes by.  It keeps one field
    at most, so that a thousand endless headers take no memory."""
    _BY = re.compile(rb"(?:^|\s)by\s+([^\s;()]+)", re.I)

    def __init__(self) -> None:
        self.held = b""                 # a line that has no end yet
        self.field = b""                # unfolded
        self.left = HEADER_SCAN_MAX
        self.fields = 0
        self.names: List[bytes] = []    # those after `by`, RFC 5321 4.4

    def feed(self, data: bytes, is_last: bool) -> bool:
        """Part of the message, its newlines mended.  True when the header is over."""
        *lines, rest = (self.held + data[:self.left]).split(b"\r\n")
        self.held, self.left = rest[:HEADER_FIELD_KEPT], self.left - len(data)
        if is_last or self.left <= 0:
            lines.append(b"")
        for line in lines:
            if line[:1] not in (b" ", b"\t"):       # the field before it is whole
                if self.field[:9].lower() == b"received:":
                    self.fields += 1
                    self.names += [name.lower().rstrip(b".") for name in self._BY.findall(self.field)[:1]]
                self.field = b""
            if not line:
                return True
            self.field = (self.field + line)[:HEADER_FIELD_KEPT]
        return False


class Recipient(NamedTuple):
    path: Path
    notify: str
    orcpt: str

    @property
    def address(self) -> str:
        return str(self.path)


@dataclasses.dataclass(eq=False)
class Transaction:
    """One message being given to us; the session outlives many."""
    sender: str
    size: int = 0                       # as declared, 0 when not
    body: str = ""
    smtputf8: bool = False
    ret: str = ""
    envid: str = ""
    recipients: List[Recipient] = dataclasses.field(default_factory=list)
    rcpt_refused: bool = False
    refused: Optional[Reply] = None     # the answer its end of data will get
    octets: int = 0                     # of the message
    received: int = 0                   # ... and as they came, with NULs that are not kept
    newlines: Newlines = dataclasses.field(default_factory=Newlines)
    opening: Opening = dataclasses.field(default_factory=Opening)
    hops: Optional[Hops] = dataclasses.field(default_factory=Hops)      # None when the header is over


def demand(is_so: object, code: int, status: str, text: str) -> None:
    if not is_so:
        raise Refuse(code, status, text)


def parse_word(text: Optional[str], *known: Optional[str]) -> Any:
    """A parameter that has few values, or none at all."""
    word = text and text.upper()
    demand(word in known, 501, "5.5.4", "Syntax error in parameters")
    return word


PARAMETERS: Dict[str, Dict[str, Callable[[Optional[str]], Any]]] = {
    "FROM:": {"SIZE": parse_size,
              "BODY": lambda text: parse_word(text, "7BIT", "8BITMIME"),
              "SMTPUTF8": lambda text: parse_word(text, None) is None,
              "RET": lambda text: parse_word(text, "FULL", "HDRS"),
              "ENVID": lambda text: parse_xtext(text, ENVID_MAX),
              "AUTH": lambda text: None},   # RFC 4954 5 makes us take it; nothing here depends on it
    "TO:": {"NOTIFY": parse_notify, "ORCPT": parse_orcpt}}


def parse_argument(text: str, word: str, status: str) -> Tuple[Path, Dict[str, Any]]:
    """What follows MAIL or RCPT: its path, and its parameters by name.  Raises Refuse."""
    demand(text[:len(word)].upper() == word, 501, "5.5.4", "Syntax: %s<address>" % word)
    path, rest = parse_path(text[len(word):].lstrip(" \t"), status)
    known, given = PARAMETERS[word], parse_parameters(rest)
    values = {name.lower(): known[name](value) for name, value in given.items() if name in known}
    for name in given:
        demand(name in known, 555, "5.5.4", "Unsupported parameter: %s" % name)
    return path, values


class Login(NamedTuple):
    """Who a client says it is, by AUTH.  Without a username the response was not in form."""
    mechanism: str
    username: str
    challenge: bytes            # ours, for CRAM-MD5
    proof: bytes                # the digest in hex, or the password itself

    def is_right(self, password: str) -> bool:
        """RFC 2195 2, RFC 4616 2; takes the same time whatever is wrong.  Raises
        ValueError on a machine whose policy forbids MD5."""
        right = password.encode("utf-8")
        if self.mechanism == "CRAM-MD5":
            right = hmac.new(right, self.challenge, "md5").hexdigest().encode("ascii")
        is_same = hmac.compare_digest(hashlib.sha256(right).digest(), hashlib.sha256(self.proof).digest())
        return is_same and self.username != ""


def parse_response(mechanism: str, response: bytes, challenge: bytes) -> Login:
    """CRAM-MD5: `name SP digest`, the name may have blanks (RFC 2195 2).  PLAIN:
    `[identity] NUL name NUL password` (RFC 4616 2); nobody may act as another."""
    if mechanism == "CRAM-MD5":
        name, _, proof = response.rpartition(b" ")
        proof = proof.lower()
    else:
        identity, name, proof, *more = response.split(b"\0") + [b"", b""]
        name = name if len(more) == 2 and identity in (b"", name) else b""
    try:
        username = name.decode("utf-8") if len(name) <= LOGIN_MAX else ""
    except UnicodeDecodeError:
        username = ""
    return Login(mechanism, username, challenge, proof)


# RFC 4648 4.  Python's decoder is not so strict, and differs between versions.
BASE64 = re.compile(rb"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")


# A command that asks something is a generator.  It yields an Ask and goes on with the
# answer, or yields None and goes on with the client's next line.
Story = Generator[Optional[Ask], Any, None]
Mode = enum.Enum("Mode", "COMMAND DATA CHUNK CLOSED")       # how the next octets are read


class Stage(enum.Enum):
    """How far a dialogue has come; which command is legal where is in COMMANDS."""
    START = "send HELO or EHLO first"
    READY = "need MAIL command"
    MAIL = "need RCPT command"
    RCPT = "MAIL transaction in progress"
    CHUNKS = "BDAT in progress"


def too_big(limit: float) -> Reply:
    return Reply(552, "5.3.4", "Message size exceeds the limit of %d octets" % limit)


OK = Reply(250, "2.0.0", "Ok")
NEEDS_SMTPUTF8 = Reply(553, "5.6.7", "Address needs SMTPUTF8")


class Session:
    """The dialogue with one client.  greet(), receive(), resume() and shut() return
    actions in the order in which they must take effect.  It keeps its configuration
    over a SIGHUP."""

    def __init__(self, cfg: Config, has_tls: bool, address: str, challenge: bytes,
                 is_odmr: bool = False) -> None:
        self.cfg, self.has_tls = cfg, has_tls
        self.limit = cfg.max_message_size or INF
        self.address = address
        self.challenge = challenge      # for CRAM-MD5, RFC 2195 2: no two sessions have the same
        self.is_odmr = is_odmr          # on a port of odmr_listen
        self.name = "unknown"           # the server sets it when the DNS has told it
        self.helo = ""
        self.esmtp = False
        self.tls: Optional[str] = None  # protocol version, TLSv1.3
        self.cipher = ""
        self.stage = Stage.START
        self.mode = Mode.COMMAND
        self.transaction: Optional[Transaction] = None
        self.errors = 0
        self.junk_commands = 0          # NOOP, RSET and the like since the last message
        self.username = ""              # who it has proved to be, by AUTH
        self.failed_logins = 0
        self.exchange: Optional[Story] = None       # AUTH, which waits for the client's next line
        self.buffer = bytearray()
        self.is_skipping = False        # within a command line that is too long
        self.waiting: Optional[Story] = None        # for the answer to the last Ask
        self.reader: Union[DataReader, ChunkReader] = DataReader()
        self.out: List[Action] = []

    def greet(self) -> List[Action]:
        self.send(Reply(220, "", "%s ESMTP etrn_relay" % self.cfg.hostname))
        return self._run()

    def receive(self, data: bytes) -> List[Action]:
        self.buffer += data if self.mode is not Mode.CLOSED else b""
        return self._run()

    def resume(self, answer: Any) -> List[Action]:
        story, self.waiting = self.waiting, None
        self._go_on(story, answer)
        return self._run()

    def shut(self, reply: Reply, reject: str = "") -> List[Action]:
        """The server ends the session: timeout, shutdown, a bug.  `reject`: the
        client's fault that the log shall tell, as PREGREET."""
        if reject:
            self.reject(reject, reply)
        else:
            self.send(reply, close=True)
        return self._run()

    @property
    def peer(self) -> str:
        return format_peer(self.address, self.name)

    def send(self, reply: Reply, close: bool = False) -> None:
        self.out.append(Send(reply.wire()))
        if close or reply.code == 421:
            self.out.append(Close(at_once=reply.code == 221))
            self.mode = Mode.CLOSED
            self.buffer.clear()

    def _go_on(self, story: Optional[Story], answer: Any = None) -> None:
        """To the command's next question or its end."""
        try:
            question = story.send(answer) if story is not None else None
        except StopIteration:
            return
        if question is None:
            self.exchange = story
        else:
            self.waiting = story
            self.out.append(question)

    def reject(self, command: str, reply: Reply, *addresses: str) -> None:
        """Refuse, with a line in the log.  `addresses`: the sender, then the
        recipient; without any the session ends."""
        details = "".join(" %s=<%s>" % (name, printable(one)) for name, one in zip(("from", "to"), addresses))
        self.out.append(Note("NOQUEUE: reject: %s from %s: %s;%s proto=%s helo=<%s>" % (
            command, self.peer, printable(str(reply)), details, "ESMTP" if self.esmtp else "SMTP",
            printable(self.helo, 100))))
        self.send(reply, close=not addresses)

    def fail(self, reply: Optional[Reply]) -> None:
        """A protocol error; refused recipients and messages do not come here.
        None: it only counts."""
        self.errors += 1
        if self.errors > ERRORS_MAX:
            self.out.append(Note("too many errors after %s from %s" % (self.stage.name, self.peer)))
            reply = Reply(421, "4.7.0", "%s Error: too many errors" % self.cfg.hostname)
        if reply is not None:
            self.send(reply)

    # -- reading

    def _run(self) -> List[Action]:
        while self.buffer and self.waiting is None:
            if self.mode in (Mode.DATA, Mode.CHUNK):
                self._read_body()
            elif not self._read_command():
                break
        out, self.out = self.out, []
        return out

    def _read_command(self) -> bool:
        """Run the first line in the buffer; False when its end has not come yet.  Of
        a line that is too long the rest is thrown away as it comes."""
        end = self.buffer.find(b"\n")
        size = len(self.buffer) if end < 0 else end
        if end < 0 and size < COMMAND_MAX and not self.is_skipping:
            return False
        line = bytes(self.buffer[:size])
        del self.buffer[:size + 1]
        is_rest, self.is_skipping = self.is_skipping, end < 0
        if size < COMMAND_MAX and not is_rest:
            self._command(line.rstrip(b"\r").strip(b" \t"))     # some clients end lines with CR CR LF
        elif not is_rest:
            status, self.exchange = "5.5.6" if self.exchange else "5.5.2", None     # RFC 4954 6
            self.fail(Reply(500, status, "Line too long"))
        return True

    def _read_body(self) -> None:
        """Octets of a chunk that is out of order are thrown away."""
        data, rest = self.reader.feed(bytes(self.buffer))
        self.buffer.clear()
        is_legal, is_last = self.stage in (Stage.RCPT, Stage.CHUNKS), rest is not None and self.reader.is_last
        if is_legal:
            self._keep(data, is_last)
        if rest is None or self.mode is Mode.CLOSED:
            return
        self.mode = Mode.COMMAND
        self.buffer += rest
        if not is_legal or self.transaction is None:
            self._no_recipients()
        elif is_last:
            self._go_on(self._end_of_data())
        else:
            self.send(self.transaction.refused or Reply(250, "2.0.0", "Chunk received"))

    def _keep(self, data: bytes, is_last: bool) -> None:
        """Body octets: mended, counted, searched for hops, passed on."""
        transaction, limit = self.transaction, self.limit
        assert transaction is not None
        transaction.received += len(data)
        data = transaction.opening.feed(transaction.newlines.feed(data, is_last))
        transaction.octets += len(data)
        if transaction.octets > limit:
            self._refuse(transaction, too_big(limit))
        if transaction.received > limit * OVERSIZE_FACTOR + RECEIVE_OCTETS:
            return self.send(transaction.refused or too_big(limit), close=True)
        hops = transaction.hops
        if hops is not None and hops.feed(data, is_last):
            transaction.hops = None
            # RFC 5321 6.3.  Our own field is not among them; our name counts as a whole `by` name only.
            ours = hops.names.count(self.cfg.hostname.encode("ascii"))
            if hops.fields >= HOPS_MAX or ours >= OWN_HOPS_MAX:
                text = "Too many hops: %d Received fields, %d of them ours" % (hops.fields, ours)
                self._refuse(transaction, Reply(554, "5.4.6", text))
        if data and transaction.refused is None:
            self.out.append(Body(data, transaction))

    def _refuse(self, transaction: Transaction, reply: Reply) -> None:
        """Its end of data will be answered so; the first fault counts."""
        if transaction.refused is None:
            transaction.refused = reply
            self.out.append(Discard())

    def _end_of_data(self) -> Story:
        transaction = self.transaction
        assert transaction is not None
        if transaction.newlines.found and self.cfg.bare_newline == "reject":
            self._refuse(transaction, Reply(550, "5.6.0", "Bare CR, bare LF or NUL in the message"))
        reply = transaction.refused or (yield Ask("commit", transaction))
        self.transaction, self.stage = None, Stage.READY
        if reply.code >= 400:
            return self.reject("END-OF-MESSAGE", reply, transaction.sender, transaction.recipients[0].address)
        self.junk_commands = 0
        self.send(reply)

    # -- commands

    def _command(self, line: bytes) -> None:
        try:
            if self.exchange is not None:
                story, self.exchange = self.exchange, None
                return self._go_on(story, line)
            demand(not CONTROLS.search(line), 500, "5.5.2", "Control characters in a command")
            verb, argument = (line.split(None, 1) + [b"", b""])[:2]     # at blanks and TABs
            verb = verb.upper()
            if verb in HTTP:
                return self.reject(verb.decode("ascii"), Reply(521, "5.5.1", "This is a mail server"))
            demand(not self.is_odmr or verb in ODMR_COMMANDS, 502, "5.5.1",     # RFC 2645 5.3
                   "Not on this port, which is for on-demand mail relay")
            demand(verb in COMMANDS, 500, "5.5.2", "Command unrecognized")
            self.junk_commands += verb in JUNK_COMMANDS
            if verb in JUNK_COMMANDS and self.junk_commands > JUNK_COMMANDS_MAX:
                self.fail(None)
                if self.mode is Mode.CLOSED:
                    return
            handler, legal = COMMANDS[verb]
            if self.stage not in legal:
                raise Refuse(*self._out_of_order())
            self._go_on(handler(self, argument.decode("utf-8")))
        except UnicodeDecodeError:
            self.fail(Reply(501, "5.5.4", "Not UTF-8"))
        except Refuse as refusal:
            self.fail(refusal.reply)

    def _out_of_order(self) -> Reply:
        return Reply(503, "5.5.1", "Bad sequence of commands: %s" % self.stage.value)

    def _no_recipients(self) -> None:
        """A client that pipelines DATA behind refused recipients makes no error, RFC 2920 3.1."""
        if self.transaction is not None and self.transaction.rcpt_refused:
            return self.send(Reply(503, "5.5.1", "No valid recipients"))
        self.fail(self._out_of_order())

    def reset(self) -> None:
        if self.transaction is not None:
            self.transaction = None
            self.out.append(Discard())
        if self.stage is not Stage.START:
            self.stage = Stage.READY

    def do_helo(self, text: str, esmtp: bool) -> None:
        demand(text, 501, "5.5.4", "Syntax: %s hostname" % ("EHLO" if esmtp else "HELO"))
        self.reset()
        self.helo, self.esmtp, self.stage = text.replace("\t", " "), esmtp, Stage.READY
        self.send(Reply(250, "", "\n".join([self.cfg.hostname, *(self.extensions() if esmtp else [])])))

    def extensions(self) -> List[str]:
        tls = ["STARTTLS"] if self.has_tls and not self.tls else []
        auth = ["AUTH CRAM-MD5" + " PLAIN" * bool(self.tls)] if self.cfg.has_logins else []
        if self.is_odmr:
            return [*tls, *auth, "ATRN", "ENHANCEDSTATUSCODES"]
        return [*tls, *auth, "PIPELINING", "SIZE %d" % self.cfg.max_message_size, "ETRN", "8BITMIME",
                "SMTPUTF8", "ENHANCEDSTATUSCODES", "DSN", "CHUNKING",
                "LIMITS RCPTMAX=%d" % self.cfg.max_recipients]

    def do_mail(self, text: str) -> Story:
        path, given = parse_argument(text, "FROM:", "5.1.7")
        demand(path.domain or not path.local, 501, "5.1.7", "Sender address needs a domain")
        given.pop("auth", None)
        transaction = Transaction(str(path), **given)
        if not transaction.smtputf8 and not text.isascii():
            refused = NEEDS_SMTPUTF8
        elif transaction.size > self.limit:
            refused = too_big(self.limit)
        else:
            refused = yield Ask("mail", transaction)
        if refused is not None:
            return self.reject("MAIL", refused, transaction.sender)
        self.transaction, self.stage = transaction, Stage.MAIL
        self.send(Reply(250, "2.1.0", "Ok"))

    def do_rcpt(self, text: str) -> Story:
        path, given = parse_argument(text, "TO:", "5.1.3")
        transaction, postmaster_at = self.transaction, self.cfg.first_domain
        assert transaction is not None
        if not path.domain and not path.is_rerouting:
            demand(path.local.lower() == "postmaster" and postmaster_at, 501, "5.1.3",
                   "Recipient address needs a domain")
            path = path._replace(domain=postmaster_at)      # RFC 5321 4.1.1.3
        if not transaction.smtputf8 and not text.isascii():
            refused = NEEDS_SMTPUTF8
        elif path.is_rerouting or self.cfg.domain(path.domain) is None:
            refused = Reply(554, "5.7.1", "<%s>: Relay access denied" % str(path))
        elif len(transaction.recipients) >= self.cfg.max_recipients:
            refused = Reply(452, "4.5.3", "Too many recipients")
        else:
            recipient = Recipient(path, given.get("notify", ""), given.get("orcpt", ""))
            refused = yield Ask("rcpt", recipient)
        if refused is not None:
            transaction.rcpt_refused = True
            return self.reject("RCPT", refused, transaction.sender, str(path))
        transaction.recipients.append(recipient)
        self.stage = Stage.RCPT
        self.send(Reply(250, "2.1.5", "Ok"))

    def do_data(self, text: str) -> None:
        demand(not text, 501, "5.5.4", "Syntax: DATA")
        if self.stage is not Stage.RCPT:
            return self._no_recipients()
        self.reader, self.mode = DataReader(), Mode.DATA
        self.send(Reply(354, "", "End data with <CR><LF>.<CR><LF>"))

    def do_bdat(self, text: str) -> None:
        match = re.fullmatch(r"([0-9]{1,20})(?:[ \t]+(LAST))?", text, re.I | re.A)
        if not match:
            raise Refuse(501, "5.5.4", "Syntax: BDAT octets [LAST]")
        size = int(match.group(1))
        if size > self.limit * OVERSIZE_FACTOR:
            return self.send(too_big(self.limit), close=True)
        self.reader, self.mode = ChunkReader(size, match.group(2) is not None), Mode.CHUNK
        self.stage = Stage.CHUNKS if self.stage is Stage.RCPT else self.stage
        if not size:
            self._read_body()

    def do_rset(self, text: str) -> None:
        self.reset()
        self.send(OK)

    def do_vrfy(self, text: str) -> None:
        """RFC 5321 3.5.3: an address or a user's name, and nothing is told of either."""
        demand(text, 501, "5.5.4", "Syntax: VRFY address")
        if "@" in text:
            parse_path(text, "5.1.3")
        self.send(Reply(252, "2.0.0", "Send some mail, it will be tried"))

    def do_starttls(self, text: str) -> Story:
        """RFC 3207 4.  What came behind the command in the clear would later seem
        to come from within TLS: such a client is turned away."""
        demand(self.has_tls, 502, "5.5.1", "STARTTLS not offered")
        demand(not text, 501, "5.5.4", "Syntax: STARTTLS")
        demand(not self.tls, 503, "5.5.1", "TLS is active already")
        if self.buffer:
            return self.reject("STARTTLS", Reply(501, "5.5.1", "Data behind STARTTLS"))
        self.reset()
        self.send(Reply(220, "2.0.0", "Ready to start TLS"))
        self.tls, self.cipher = yield Ask("starttls", None)
        # All that was said before is forgotten, but the errors: RFC 3207 4.2.
        self.helo, self.esmtp, self.stage, self.username = "", False, Stage.START, ""
        self.buffer.clear()

    def do_auth(self, text: str) -> Story:
        """RFC 4954.  It tells for whom ETRN and ATRN are asked; it adds no other right and takes none."""
        mechanism, initial = (text.split(None, 1) + ["", ""])[:2]
        mechanism = mechanism.upper()
        demand(self.cfg.has_logins, 502, "5.5.1", "AUTH not offered")
        demand(not self.username, 503, "5.5.1", "Authenticated already")
        demand(mechanism, 501, "5.5.4", "Syntax: AUTH mechanism")
        demand(self.tls or mechanism != "PLAIN", 538, "5.7.11",
               "Encryption required for this mechanism: STARTTLS first")
        demand(mechanism in ("CRAM-MD5", "PLAIN"), 504, "5.5.4", "Unknown mechanism")
        demand(mechanism == "PLAIN" or not initial, 501, "5.7.0", "This mechanism has no initial response")
        line = b"" if initial == "=" else initial.encode("utf-8")
        if not initial:
            challenge = self.challenge if mechanism == "CRAM-MD5" else b""
            self.send(Reply(334, "", base64.b64encode(challenge).decode("ascii")))
            line = yield None
        demand(line != b"*", 501, "5.7.0", "Authentication cancelled")
        demand(BASE64.fullmatch(line), 501, "5.5.2", "Not base64")          # RFC 4954 4
        # A response that is not in form is answered like a wrong password, which tells nobody anything.
        login = parse_response(mechanism, base64.b64decode(line), self.challenge)
        refused = yield Ask("login", login)
        username = printable(login.username, 100)
        if refused is None:
            self.username = login.username
            self.out.append(Note("%s: sasl_method=%s, sasl_username=%s" % (self.peer, mechanism, username)))
            return self.send(Reply(235, "2.7.0", "Authentication successful"))
        if refused.code == 535:         # with any other it could not be judged
            self.out.append(Note("warning: %s: SASL %s authentication failed: %s, sasl_username=%s" % (
                self.peer, mechanism, refused.text, username)))
            self.failed_logins += 1
        if self.failed_logins >= LOGINS_FAILED_MAX:
            refused = Reply(421, "4.7.0", "%s Error: too many failed authentications" % self.cfg.hostname)
        self.send(refused)

    def do_etrn(self, text: str) -> Story:
        """RFC 1985 5.2; always one line, fetchmail reads no more."""
        demand(text, 500, "5.5.4", "Syntax: ETRN domain")
        at = "@" if text[0] == "@" else ""
        self.send((yield Ask("etrn", at + parse_node(text[len(at):]))))

    def do_atrn(self, text: str) -> Story:
        """RFC 2645 5.2.1.  Without domains all of the customer's are meant."""
        demand(self.is_odmr, 502, "5.5.1", "ATRN is for the ports of on-demand mail relay")
        demand(self.username, 530, "5.7.0", "Authentication required")
        words = text.split(",") if text else []
        reply = yield Ask("atrn", tuple(parse_node(word.strip(" \t")) for word in words))
        self.send(reply)
        if reply.code == 250:
            self.out.append(Reverse(bytes(self.buffer)))
            self.mode = Mode.CLOSED
            self.buffer.clear()


def parse_node(text: str) -> str:
    """The domain in ETRN or ATRN."""
    try:
        return parse_domain(text)
    except ValueError:
        raise Refuse(501, "5.5.4", "Not a domain") from None


ANY = frozenset(Stage)
READY = frozenset({Stage.READY})
OPEN = frozenset({Stage.MAIL, Stage.RCPT})
HELP = Reply(214, "2.0.0", "HELO EHLO STARTTLS AUTH MAIL RCPT DATA BDAT RSET NOOP VRFY HELP ETRN ATRN QUIT")
Handler = Callable[[Session, str], Optional[Story]]
COMMANDS: Dict[bytes, Tuple[Handler, FrozenSet[Stage]]] = {     # verb: (handler, legal in)
    b"HELO": (lambda session, text: session.do_helo(text, esmtp=False), ANY),
    b"EHLO": (lambda session, text: session.do_helo(text, esmtp=True), ANY),
    b"MAIL": (Session.do_mail, READY),
    b"RCPT": (Session.do_rcpt, OPEN),
    b"DATA": (Session.do_data, OPEN),
    b"BDAT": (Session.do_bdat, ANY),            # it judges for itself, after the octets
    b"RSET": (Session.do_rset, ANY),
    b"NOOP": (lambda session, text: session.send(OK), ANY),
    b"VRFY": (Session.do_vrfy, ANY),
    b"EXPN": (lambda session, text: session.fail(Reply(502, "5.5.1", "EXPN not implemented")), ANY),
    b"HELP": (lambda session, text: session.send(HELP), ANY),
    b"QUIT": (lambda session, text: session.send(Reply(221, "2.0.0", "Bye"), close=True), ANY),
    b"STARTTLS": (Session.do_starttls, ANY),    # a transaction is forgotten, RFC 3207 4.2
    b"AUTH": (Session.do_auth, READY),          # not within a transaction, RFC 4954 4
    b"ETRN": (Session.do_etrn, READY),          # not within a transaction, RFC 1985 5
    b"ATRN": (Session.do_atrn, ANY),            # 530 comes first, RFC 2645 5.2.1
}
ODMR_COMMANDS = frozenset(b"EHLO HELO STARTTLS AUTH ATRN NOOP RSET HELP QUIT".split())
JUNK_COMMANDS = frozenset(b"NOOP RSET VRFY HELP EHLO HELO".split())     # Postfix's word: they deliver nothing
HTTP = frozenset(b"GET POST PUT HEAD CONNECT OPTIONS DELETE PATCH TRACE".split())


def format_received(session: Session, transaction: Transaction, id: str, now: Time,
                    recipients: Sequence[Recipient]) -> bytes:
    """Our trace field, RFC 5321 4.4, in the shape from which spam filters take
    the client's address.  `with` as in RFC 3848 and RFC 6531 4.3.  `recipients`
    are those of this copy; `for` may tell a lone one only, RFC 5321 7.2."""
    helo, name = (re.sub(r"[^A-Za-z0-9.:_\[\]-]", "?", word[:255]) for word in (session.helo, session.name))
    address = "IPv6:" + session.address if ":" in session.address else session.address
    protocol = "SMTP"
    if session.esmtp:
        protocol = ("UTF8SMTP" if transaction.smtputf8 else "ESMTP") + ("S" if session.tls else "")
    using = "\r\n\t(using %s with cipher %s)" % (session.tls, session.cipher) if session.tls else ""
    alone = recipients[0].address if len(recipients) == 1 else ""
    named = "\r\n\tfor <%s>" % alone if alone.isascii() and 0 < len(alone) < LINE_MAX else ""
    field = "Received: from %s (%s [%s])%s\r\n\tby %s (etrn_relay) with %s id %s%s;\r\n\t%s\r\n" % (
        helo, name, address, using, session.cfg.hostname, protocol, id, named, format_date(int(now)))
    return field.encode("ascii", "replace")


# == 9. SCHEDULE ===============================================================
# When is a message due, how many connections may a primary have, what is its
# state.  Pure: time is an argument, nothing is sent or read here.  Uses 2 LIMITS,
# 3 GRAMMAR, 4 CONFIG, and Now of 6 LOOP.

NOTICES, ALERTS = "notice:", "alert:"   # begin the names of destinations that are not domains of ours
WAITS: Dict[Hosts, str] = {
    "atrn": "waits to be collected by the domain's own mail server (ATRN)",
    "etrn": "waits for the domain's own mail server to say where it is (authenticated ETRN)"}
UNCOLLECTED = "the domain's own mail server did not come for it in time"
COUNTERS = ("accepted", "delivered", "bounced", "deferred", "expired")


def is_domain(name: str) -> bool:
    """Not a destination of our own notices and alerts."""
    return not name.startswith((NOTICES, ALERTS))


def say_destination(name: str) -> str:
    kind, _, domain = name.partition(":")
    return name if is_domain(name) else "%ss to %s" % (kind, domain)


class Hop(NamedTuple):
    """Where a connection may lead: one address of a host."""
    host: str
    address: str
    port: int

    def __str__(self) -> str:
        return "%s[%s]:%d" % (self.host, self.address, self.port)


class Verdict(NamedTuple):
    """What became of one recipient: from the wire to sidecar, log and notice."""
    address: str
    kind: str                   # sent, deferred, refused; once judged also bounced, expired, delayed
    status: str                 # RFC 3463
    response: str               # as the peer said it, or our own words
    remote: str                 # host that said it, or empty
    is_good: Optional[bool] = None      # what RCPT's answer says of the recipient itself
    is_told: bool = True        # the next host took over the duty to report success, RFC 3461 5.2


class Primary(enum.Enum):
    UNKNOWN, UP, DOWN, REJECTING = "unknown", "up", "down", "rejecting"


class Event(enum.Enum):
    """What can happen to a primary, as its destination sees it."""
    HEARD = "it greeted"
    TAKEN = "it took a message"
    AWAY = "it cannot be reached, or hangs up before it answers anything"
    REFUSES = "it refused three in a row"
    PARDONED = "the operator says that it is itself again"
    LEFT = "it came for its mail and has gone again, or it is another server from now on"


TRANSITIONS: Dict[Primary, Dict[Event, Primary]] = {        # what is not here changes nothing
    Primary.UNKNOWN: {Event.HEARD: Primary.UP, Event.AWAY: Primary.DOWN, Event.REFUSES: Primary.REJECTING},
    Primary.UP: {Event.AWAY: Primary.DOWN, Event.REFUSES: Primary.REJECTING, Event.LEFT: Primary.UNKNOWN},
    Primary.DOWN: {Event.HEARD: Primary.UP, Event.TAKEN: Primary.UP, Event.LEFT: Primary.UNKNOWN},
    Primary.REJECTING: {Event.TAKEN: Primary.UP, Event.PARDONED: Primary.UP, Event.AWAY: Primary.DOWN,
                        Event.LEFT: Primary.UNKNOWN},
}


class Change(NamedTuple):
    """Of a primary's state; for the log, the alerts and the page."""
    was: Primary
    now: Primary
    lasted: float               # seconds in the state before


class State(enum.IntEnum):
    """Of an entry.  Each keys a table at every step of a message: a number is the quickest key."""
    READY, LATER, SENDING, HELD = range(4)


class Entry:
    """One message in a destination's queue.  Small, because a hundred thousand may wait."""
    __slots__ = ("id", "size", "received", "deadline", "due", "tries", "base", "answers", "round", "state",
                 "is_held", "is_delay_told", "is_ours")

    def __init__(self, id: str, size: int, received: Time, attempts: int = 0, is_held: bool = False,
                 is_delay_told: bool = False, is_ours: bool = False) -> None:
        self.id, self.size, self.received = id, size, received
        self.deadline = 0.0             # monotonic
        self.due = 0.0                  # monotonic, when LATER
        # `tries`, and the failures of its destination since `base`, are the failed attempts since the clock
        # last jumped.  There must be ATTEMPTS_MIN before it expires, and one of them in this run.
        self.tries, self.base = min(attempts, ATTEMPTS_MIN - 1), 0
        self.answers = 0                # to this very message; they set its pause
        self.round = 0                  # flushes until it was last given to a connection
        self.state = State.READY
        self.is_held = is_held          # by itself; the whole destination may be, too
        self.is_delay_told = is_delay_told
        self.is_ours = is_ours          # accepted in this run: the clock of this run told its age


class EntryQueue:
    """The messages for one primary: their order, pauses, holds, attempts and ages."""

    def __init__(self, name: str, cfg: DomainConfig) -> None:
        self.name, self.cfg = name, cfg
        self.entries: Dict[str, Entry] = {}
        self.first: Optional[Entry] = None      # the oldest, unless it has left
        self.by_state: Dict[State, collections.OrderedDict[str, Entry]] = {     # READY: in the order they go
            state: collections.OrderedDict() for state in State}
        self.later: List[Tuple[float, str]] = []        # a heap of LATER ones, and of some that were
        self.octets = 0
        self.is_held = False            # --hold DOMAIN: later mail, too
        self.next_look = INF            # monotonic, when the next entry expires or its delay is told
        self.rounds = 0                 # flushes, all told
        self.flushing: Set[str] = set()         # IDs that the present flush has yet to try
        # IDs of those SENDING that keep no other waiting: their answers are late, or are being written down.
        self.late: Set[str] = set()
        self.failures = 0               # attempts to reach the primary that failed, all told
        self.counters = dict.fromkeys(COUNTERS, 0)

    def add(self, entry: Entry, now: Now, pause: float = 0.0) -> None:
        """A new message, or one found in the spool with a pause still to run."""
        self.entries[entry.id] = entry
        if self.first is not None and entry.received < self.first.received:
            self.first = entry
        self.octets += entry.size
        entry.base = self.failures
        entry.due = now.mono + min(pause, self.cfg.max_retry_interval)
        self.set_deadline(entry, now)
        self._put(entry, State.LATER if pause > 0 else State.READY)

    def set_deadline(self, entry: Entry, now: Now) -> None:
        entry.deadline = now.mono + self.cfg.lifetime - (now.wall - entry.received)
        self.next_look = min(self.next_look, entry.deadline, self.delay_at(entry))

    def delay_at(self, entry: Entry) -> float:
        """Monotonic: when its sender is to be told that it waits."""
        if not self.cfg.delay_notice or self.cfg.is_notices or entry.is_delay_told:
            return INF
        return entry.deadline - self.cfg.lifetime + self.cfg.delay_notice

    def _put(self, entry: Entry, state: State) -> None:
        """The only place that changes an entry's state."""
        self.by_state[entry.state].pop(entry.id, None)
        if state is State.SENDING:
            entry.round = self.rounds
        else:
            self.late.discard(entry.id)
            if entry.is_held or self.is_held:
                state = State.HELD
                self.flushing.discard(entry.id)
        entry.state = state
        self.by_state[state][entry.id] = entry
        if state is State.LATER:
            heapq.heappush(self.later, (entry.due, entry.id))

    def urge(self, entry: Entry) -> None:
        """If it is due, it goes before all others."""
        if entry.state is State.READY:
            self.by_state[State.READY].move_to_end(entry.id, last=False)

    def release(self) -> None:
        """Everything but held mail is due now.  Messages that were tried already go in front."""
        self.give_back(*self.by_state[State.LATER].values())
        self.later.clear()

    def put_off(self, entry: Entry, now: Now, pause: float) -> None:
        """Tried, and to be tried again; at once when a flush came meanwhile."""
        self.flushing.discard(entry.id)
        entry.due = now.mono + pause
        self._put(entry, State.LATER if entry.round == self.rounds else State.READY)

    def give_back(self, *entries: Entry) -> None:
        """Their pauses are over, or they were not tried after all.  They go in front, the oldest first."""
        newest = max((entry.received for entry in entries), default=0.0)
        older = itertools.takewhile(lambda one: one.received < newest, self.by_state[State.READY].values())
        front = sorted([*older, *entries], key=lambda entry: (entry.received, entry.id), reverse=True)
        for entry in entries:
            self._put(entry, State.READY)
        for entry in front:
            self.urge(entry)

    def take_out(self, entry: Entry) -> None:
        """To be ended by an operator or its age: nobody else gets it, and none waits for it."""
        self._put(entry, State.SENDING)
        self.late.add(entry.id)

    def drop(self, id: str) -> None:
        entry = self.entries.pop(id)
        del self.by_state[entry.state][id]
        self.octets -= entry.size
        self.flushing.discard(id)
        self.late.discard(id)

    def hold(self, entry: Entry, on: bool) -> None:
        """By itself.  One that is being sent is held if it comes back."""
        entry.is_held = on
        if entry.state is not State.SENDING and (on or self.is_held) != (entry.state is State.HELD):
            self._forget_tries(entry)   # released mail has its chance, however old it became
            self._put(entry, State.READY)
            self.next_look = min(self.next_look, entry.deadline, self.delay_at(entry))

    def hold_all(self, on: bool) -> List[Entry]:
        """All of it and all that comes later, or none.  Returns those that were held by themselves and
        are no more."""
        alone = [entry for entry in self.entries.values() if entry.is_held and not on]
        self.is_held = on
        for entry in self.entries.values():
            self.hold(entry, entry.is_held and on)
        return alone

    def count_attempt(self, entry: Entry, is_whole: bool = True) -> int:
        """The primary answered.  `is_whole`: for every recipient that was due; else the others go at once,
        and the pause does not grow.  Returns the number of attempts its sidecar does not know of yet."""
        new = 1 + self.failed_since(entry)
        entry.tries += new
        entry.base = self.failures
        entry.answers += is_whole
        return new

    def failed_since(self, entry: Entry) -> int:
        """Failed connections that its sidecar does not know of yet."""
        return self.failures - entry.base

    def _forget_tries(self, entry: Entry) -> None:
        """It must be tried anew before it may expire; the attempts are told all the same."""
        entry.tries = -self.failed_since(entry)

    @property
    def oldest(self) -> Optional[Entry]:
        """Looked for when the one before has left."""
        if self.first is None or self.first.id not in self.entries:
            self.first = min(self.entries.values(), key=lambda entry: entry.received, default=None)
        return self.first


class Destination(EntryQueue):
    """A domain: what waits for its primary, and what is known of that.

    An outage ends when the primary greets.  Then one message goes alone, the canary.  Taken, it
    proves the primary, and the connections allowed double (2, 4, 8) with the messages taken."""

    def __init__(self, name: str, cfg: DomainConfig, now: Now) -> None:
        super().__init__(name, cfg)
        # the primary
        self.state, self.since, self.last_error = Primary.UNKNOWN, now.mono, ""
        self.down_since = now.mono      # monotonic: it has answered no message since then; INF when it has
        self.recovered = -INF           # monotonic, end of the last outage or of the last rejecting
        self.heard = -INF               # monotonic, when it last answered anything well
        self.is_proven = False          # has taken a message since it was last away
        self.hang_ups = 0               # in a row, after it had answered
        self.tried: Set[str] = set()    # messages that went alone since it last took one
        self.refused: Set[str] = set()  # messages refused in a row during the grace, and ...
        self.refused_good: Set[str] = set()     # ... recipients known to be good refused in a row
        self.verdicts: Deque[bool] = collections.deque(maxlen=VERDICTS)     # True for a 4xx
        self.jumped = -INF              # monotonic, when the wall clock was last set
        self.watched_since = now.mono   # since when mail that waits to be collected has its chance
        self.last_flush = -INF          # monotonic
        # the way there
        self.limit, self.taken = 1, 0   # connections that may send, and messages taken since it was raised
        self.most = 1                   # ... that may be open: those beyond `limit` wait until it is raised
        self.next_try = self.last_try = now.mono
        self.last_urged = -INF          # when it was last tried by an urgent dial or a canary
        self.is_urged = False           # a fresh connection is wanted, whatever hangs
        self.may_pipeline = True        # and send a window of messages; False: it answered out of step
        self.size_limit = 0             # its SIZE, 0 when it named none
        self.route: List[Hop] = []      # where the last good connection led, best first
        self.route_seen = 0.0           # wall
        self.home = ""                  # primary = etrn: the address the last authenticated ETRN came from
        self.is_collecting = False      # its primary is here, by ATRN

    @property
    def waits_for(self) -> str:
        """What must happen before we can connect; empty when we can try at any time.  Else there are no
        probes, questions, cut-through or failed attempts: mail waits until somebody comes for it."""
        return "" if self.home else WAITS.get(self.cfg.primary, "")

    @property
    def trouble(self) -> str:
        """Why mail is still here: what went wrong last, or what it waits for."""
        return self.last_error or self.waits_for

    @property
    def obstacle(self) -> str:
        """The same for senders.  What a rejecting primary said, it said of another's message."""
        return "" if self.state is Primary.REJECTING else self.trouble

    @property
    def is_steady(self) -> bool:
        return self.state is Primary.UP and self.is_proven

    @property
    def is_ramping(self) -> bool:
        """Whether connections beyond `limit` wait for what others are sending."""
        sending = self.by_state[State.SENDING].keys()
        use = min(self.most, len(sending) + len(self.by_state[State.READY]))
        return self.state is Primary.UP and self.limit < use and not sending <= self.late

    @property
    def label(self) -> str:
        """For the log and for people."""
        return say_destination(self.name)

    def pause(self, answers: int, now: Now) -> float:
        """Seconds after the nth 4xx for one message, n from 1; RFC 5321 4.5.4.1.  Sooner after an outage:
        greylisting passes within minutes."""
        usual = min(self.cfg.retry_interval * 2.0 ** min(answers - 1, 30), self.cfg.max_retry_interval)
        is_early = self.is_recovering(now) and answers <= len(EARLY_PAUSES_S)
        return min(usual, EARLY_PAUSES_S[answers - 1]) if is_early else usual

    # -- what goes next

    def add(self, entry: Entry, now: Now, pause: float = 0.0) -> None:
        super().add(entry, now, pause if self.state is not Primary.DOWN else 0.0)

    def take(self, most: int, now: Now) -> List[Entry]:
        """Up to `most` messages for connections, oldest first; SENDING from now on.  While the primary
        has yet to prove itself one goes alone, each in its turn: a message that it will never take
        keeps no other waiting, and neither does one whose answer is late."""
        self._wake(now)
        ready = self.by_state[State.READY]
        if self.is_proven:
            taken = list(itertools.islice(ready.values(), most))
        elif not ready or now.mono < self.next_try or self.by_state[State.SENDING].keys() - self.late:
            return []
        else:
            if ready.keys() <= self.tried:      # all had their turn: another round, from the oldest
                self.tried.clear()
            taken = [next(entry for entry in ready.values() if entry.id not in self.tried)]
            self.tried.add(taken[0].id)
            self.last_try = self.last_urged = now.mono
        for entry in taken:
            self._put(entry, State.SENDING)
        return taken

    def _wake(self, now: Now) -> None:
        """READY are those whose pause is over; of a primary that rejects one, whichever is due first."""
        over: List[Entry] = []
        is_rejecting = self.state is Primary.REJECTING
        while self.later and (self.later[0][0] <= now.mono
                              or (is_rejecting and not (over or self.by_state[State.READY]))):
            due, id = heapq.heappop(self.later)
            entry = self.by_state[State.LATER].get(id)
            if entry is not None and entry.due == due:
                over.append(entry)
        if over:
            self.give_back(*over)

    def flush(self, now: Now) -> bool:
        """ETRN, --flush, SIGUSR1.  False when one is under way already; even then there will be another
        look."""
        is_fresh = not self.flushing
        self.rounds += 1                # what is being sent goes again at once if it is put off
        if self.by_state[State.LATER] or now.mono - self.last_flush >= TRIGGER_S:   # of a flood once a second
            self.release()
            self.last_flush = now.mono
            if not self.waits_for:
                self.flushing.update(self.by_state[State.READY])
        if self.waits_for:
            return True                 # it is due, for the next who comes
        self.trigger(now)
        return is_fresh

    def trigger(self, now: Now) -> None:
        """Something says that the primary may be back: at once, whenever the last probe was.  A flood
        costs one try or canary a second."""
        self.is_urged = True
        self.next_try = min(self.next_try, max(now.mono, self.last_urged + TRIGGER_S))

    # -- when to connect

    def wanted(self, now: Now, answering: int, hanging: int, dialling: int = 0, others: int = 0) -> bool:
        """Whether to dial now.  `answering`: greeted connections; `hanging`: those whose answer is late
        (while the primary is not up: late since then); `dialling`: on their way; `others`: questions and
        messages read ahead, which wait beside what is READY."""
        self._wake(now)
        waiting = len(self.by_state[State.READY]) + others
        if self.waits_for or self.is_collecting or not waiting or now.mono < self.next_try:
            return False
        is_bearable = hanging <= max(self.cfg.connections, LATE_MAX)
        if self.is_steady and (answering or not self.is_urged):
            has_place = answering + dialling < self.limit
            return has_place and waiting > dialling and (is_bearable or self.is_urged)
        if answering:                   # the first canary is under way: the others are dialled meanwhile
            is_first = self.is_ramping and len(self.tried) == 1 and not hanging
            return is_first and answering + dialling < min(self.most, waiting + 1)
        if self.is_urged:               # ETRN and the like start a fresh connection, whatever hangs
            return True
        if self.state is Primary.UP:    # it greets, but answers to canaries are late
            return not dialling and is_bearable
        return dialling + hanging < HANGING_MAX

    def wake(self, now: Now, others: int = 0) -> Optional[float]:
        """The monotonic time at which wanted() or take() may change by itself."""
        if self.waits_for or self.is_collecting:
            return None
        times = [due for due, _ in self.later[:1]]
        waiting = others or self.by_state[State.READY] or (self.state is Primary.REJECTING and self.later)
        if self.next_try > now.mono and waiting:
            times.append(self.next_try)
        return min(times, default=None)

    def _pause(self, now: Now) -> float:
        """Between tries.  It grows with the outage: a second at first, `probe_interval` after some
        minutes.  A stranger's host is not pressed so."""
        grown = (now.mono - self.down_since) / (2 if self.cfg.is_notices else 60)
        return min(self.cfg.probe_interval, max(PROBE_FIRST_S, grown))

    def on_dial(self, now: Now) -> None:
        if self.is_urged:
            self.last_urged = now.mono
        self.last_try, self.is_urged = now.mono, False
        if self.state is not Primary.UP:
            self.next_try = now.mono + self._pause(now)

    # -- what happens to the primary

    def on(self, event: Event, now: Now, why: str = "") -> Optional[Change]:
        """What follows from an event.  Returns the change of state, if there is one."""
        if event is Event.HEARD:
            self.heard, self.is_urged = now.mono, False
            self.next_try = min(self.next_try, now.mono)        # it is there: its canary goes at once
        elif event is Event.AWAY:
            self.failures += 1
            self.last_error, self.is_proven, self.limit, self.most = why, False, 1, 1
            self.down_since = min(self.down_since, now.mono)    # who greets and hangs up is away all the time
            if not self.is_urged:
                self.flushing.clear()   # a flush that finds it away is over
                self.next_try = max(self.next_try, self.last_try + self._pause(now))
        was, after = self.state, TRANSITIONS[self.state].get(event, self.state)
        if after is was:
            return None
        change = Change(was, after, now.mono - self.since)
        self.state, self.since = after, now.mono
        self.refused.clear()
        self.refused_good.clear()
        if after is Primary.UP:
            self.next_try, self.last_error, self.hang_ups = now.mono, "", 0
            self.most = self.cfg.connections
            if was is not Primary.UNKNOWN:
                self.recovered = now.mono
        else:
            self.is_proven, self.limit, self.most = False, 1, 1
        if after in (Primary.UP, Primary.DOWN):
            self.release()              # mail waits for the primary, and not for the end of a pause
        elif after is Primary.REJECTING:
            self.last_error, self.is_urged = why, False
            self.next_try = now.mono + self.cfg.probe_interval
            self.flushing.clear()
        return change

    def on_taken(self, now: Now, connections: int) -> Optional[Change]:
        """`connections`: open ones.  The limit is raised when they are as many as it allows: a primary
        that takes no more of them is not dialled all the time."""
        self.heard, self.down_since, self.hang_ups = now.mono, INF, 0
        self.verdicts.append(False)
        for ids in (self.tried, self.refused, self.refused_good):
            ids.clear()
        self.taken += 1
        if connections >= self.limit <= self.taken:     # `limit` messages taken: double it
            self.limit, self.taken = min(self.cfg.connections, 2 * self.limit), 0
            self.most = max(self.most, self.limit)
        change = self.on(Event.TAKEN, now)
        self.is_proven = True
        return change

    def on_deferred(self, now: Now) -> None:
        """A 4xx, or a 5xx that is not believed yet.  Three canaries put off are greylisting: all must
        be offered once."""
        self.down_since = INF
        self.verdicts.append(True)
        if self.state is Primary.REJECTING:
            self.next_try = now.mono + self.cfg.probe_interval
        elif not self.is_proven:
            self.next_try = now.mono + PROBE_FIRST_S
            if len(self.tried) >= CANARIES_DEFERRED:
                self.is_proven, self.limit, self.taken = True, 1, 0
        elif len(self.verdicts) == VERDICTS and sum(self.verdicts) * 2 > VERDICTS:
            self.slow_down(now)

    def on_refused(self, now: Now, id: str, good: Iterable[str], why: str) -> Optional[Change]:
        """A message was refused, 5xx for all.  `good`: those of its recipients that the primary took
        before.  One message or recipient counts once, however often it is tried."""
        self.down_since = INF
        if not self.is_recovering(now):
            self.refused.clear()
        elif len(self.refused) < REFUSED_ROW:
            self.refused.add(id)
        if len(self.refused_good) < REFUSED_ROW:
            self.refused_good.update(good)
        if max(len(self.refused), len(self.refused_good)) < REFUSED_ROW:
            return None
        return self.on(Event.REFUSES, now, why)

    def slow_down(self, now: Now) -> None:
        """421, a refused connection, or mostly 4xx: halve the connections."""
        self.limit = self.most = max(1, self.limit // 2)
        self.taken = 0
        self.verdicts.clear()
        self.next_try = max(self.next_try, now.mono + PROBE_FIRST_S)

    def on_hang_up(self, now: Now) -> bool:
        """It ended a connection after it had answered: it is up, and the pause grows.  True for the
        first in a row."""
        self.slow_down(now)
        self.hang_ups += 1
        pause = PROBE_FIRST_S * 2.0 ** min(self.hang_ups - 1, 20)
        self.next_try = max(self.next_try, now.mono + min(self.cfg.probe_interval, pause))
        return self.hang_ups == 1

    def on_left(self, now: Now) -> None:
        """The primary is another one: the way there, and how it takes mail, are found out anew, at once."""
        self.on(Event.LEFT, now)
        self.flushing.clear()
        self.route, self.size_limit = [], 0
        self.is_proven, self.limit, self.may_pipeline = False, 1, True
        self.trigger(now)

    # -- what its word is worth

    def is_recovering(self, now: Now) -> bool:
        """Whether an outage, or its rejecting, ended less than `recovery_grace` ago."""
        return now.mono - self.recovered < self.cfg.recovery_grace

    def is_itself(self, now: Now) -> bool:
        """Whether what it says of a recipient is worth remembering.  Back from an outage it may not
        have its users yet: not before it took a message."""
        return self.state is not Primary.REJECTING and (self.is_proven or not self.is_recovering(now))

    def is_final(self, now: Now, refused_since: Optional[Time], was_good: bool) -> bool:
        """Whether a 5xx is believed: of a primary steadily up for `recovery_grace`, about a recipient
        not known to be good; or when the first one is that long ago, and no outage or rejecting came
        between."""
        grace = self.cfg.recovery_grace
        if self.state is not Primary.UP:
            return False
        if now.mono - self.since >= grace and not self.is_recovering(now) and not was_good:
            return True
        if refused_since is None or now.mono - self.jumped < grace:
            return False                # what the wall clock says of the time between is not true
        age = now.wall - refused_since
        return grace <= age <= now.mono - self.recovered

    def is_known_up(self, now: Now) -> bool:
        return not self.waits_for and self.state is Primary.UP and now.mono - self.heard <= KNOWN_UP_S

    def may_ask(self, now: Now) -> bool:
        """Whether a question to the primary is worth the waiting.  What a rejecting one says says
        nothing, and while mail waits for one that is down it is being tried all the time."""
        if self.state is Primary.REJECTING or self.waits_for:
            return False
        return self.state is not Primary.DOWN or (
            not self.entries and now.mono - self.last_try >= self.cfg.probe_interval)

    def may_cut_through(self, now: Now) -> bool:
        """Whether the primary's verdict on a new message is worth the waiting, and may be believed."""
        return (self.cfg.cutthrough and not self.waits_for and not self.cfg.is_notices and not self.is_held
                and not self.is_recovering(now) and self.state in (Primary.UP, Primary.UNKNOWN))

    # -- time

    def look(self, now: Now) -> Tuple[List[Entry], List[Entry]]:
        """Entries past their lifetime that were tried often enough, and those whose senders are to be
        told of the delay.  Held mail stays.  Where nothing can be tried, time that really passed stands
        for attempts."""
        expired: List[Entry] = []
        delayed: List[Entry] = []
        if now.mono < self.next_look:
            return expired, delayed
        self.next_look = INF
        had_chance = now.mono - self.watched_since >= min(UNCOLLECTED_S, self.cfg.lifetime)
        for entry in self.entries.values():
            if entry.state is State.HELD:
                continue
            if not self.waits_for:
                had_chance = entry.tries + self.failed_since(entry) >= ATTEMPTS_MIN
            if entry.deadline <= now.mono and entry.state is not State.SENDING and had_chance:
                expired.append(entry)
            elif self.delay_at(entry) <= now.mono:
                delayed.append(entry)
            again = min(entry.deadline, self.delay_at(entry))       # soon, where what is done now fails
            self.next_look = min(self.next_look, max(again, now.mono + SWEEP_S))
        return expired, delayed

    def on_clock_jump(self, now: Now, seconds: float) -> List[str]:
        """The wall clock was set.  Mail of this run keeps its age; mail that was here before has the
        age that the new time says.  Nothing expires before it was tried again.  Returns the IDs whose
        sidecars are wrong now."""
        self.jumped = self.watched_since = now.mono
        for entry in self.entries.values():
            self._forget_tries(entry)
            entry.received += seconds * entry.is_ours
            self.set_deadline(entry, now)
        return [entry.id for entry in self.entries.values() if entry.is_ours]

    # -- for state.json

    def to_values(self, now: Now) -> Dict[str, Any]:
        return {"primary": self.state.value, "since": max(0.0, now.to_wall(self.since)),
                "recovered": max(0.0, now.to_wall(self.recovered)),     # 0 for never
                "last_error": self.last_error, "held": self.is_held, "size_limit": self.size_limit,
                "route": [list(hop) for hop in self.route], "route_seen": self.route_seen,
                "route_of": format_primary(self.cfg.primary), "counters": dict(self.counters)}

    def from_values(self, known: Mapping[str, Any], now: Now) -> None:
        """What was known before the restart.  A primary that was up is unknown now; one that was down
        still is, so that its return is the end of an outage.  Raises what a wrong value raises: then
        only knowledge is lost."""
        def in_mono(wall: Any) -> float:
            if not 0 <= float(wall) < TIME_MAX:
                raise ValueError("not a time")
            return now.mono - max(0.0, now.wall - float(wall)) if wall else -INF
        since, recovered = in_mono(known["since"]), in_mono(known["recovered"])
        counters = {key: int(known["counters"].get(key, 0)) for key in COUNTERS}
        if known["route_of"] == format_primary(self.cfg.primary):       # else it is another server's
            route = [Hop(str(host), str(address), int(port)) for host, address, port in known["route"]]
            for hop in route:
                parse_address(hop.address)
            size_limit, self.route_seen = int(known["size_limit"]), float(known["route_seen"])
            self.route, self.size_limit = route, size_limit
        self.counters.update(counters)
        self.recovered = recovered
        if known["primary"] in (Primary.DOWN.value, Primary.REJECTING.value) and not self.waits_for:
            self.state, self.since, self.down_since = Primary.DOWN, max(since, now.mono - TIME_MAX), now.mono
            self.last_error = printable(str(known["last_error"]))


def format_primary(primary: Hosts) -> str:
    return primary if isinstance(primary, str) else ", ".join(map(str, primary))


class RecipientCache:
    """What is known of recipients: whether the primary takes them, and until when that holds.
    Addresses in lower case; RFC 5321 2.4 leaves the case of a local part to its host, but no host in
    use tells them apart."""

    def __init__(self) -> None:
        self.known: Dict[str, Tuple[bool, Time]] = {}       # address: (good, until)
        self.accept_all: Dict[str, Tuple[bool, Time]] = {}  # domain: (takes any local part, until)
        # By domain: how many were refused in a row, and until when one is known to be good.
        self.rows: Dict[str, Tuple[int, Time]] = {}
        self.is_dirty = False

    def learn(self, address: str, is_good: bool, now: Time) -> None:
        self._keep(address.lower(), is_good, now + (GOOD_S if is_good else BAD_S))
        self.is_dirty = True
        if len(self.known) > RECIPIENTS_MAX:
            kept = sorted(self.known.items(), key=lambda item: item[1])[RECIPIENTS_MAX // 10:]
            self.known = dict(kept)     # a tenth is forgotten at once: the bad and the oldest
        if len(self.rows) > RECIPIENTS_MAX:     # all subdomains of a wildcard
            del self.rows[next(iter(self.rows))]

    def _keep(self, address: str, is_good: bool, until: Time) -> None:
        self.known[address] = is_good, until
        domain = address.rpartition("@")[2]
        refused, good_until = self.rows.get(domain, (0, 0.0))
        self.rows[domain] = (0, max(until, good_until)) if is_good else (refused + 1, good_until)

    def learn_accept_all(self, domain: str, takes_all: bool, now: Time) -> None:
        self.accept_all[domain] = (takes_all, now + ACCEPT_ALL_S)
        self.is_dirty = True
        if len(self.accept_all) > RECIPIENTS_MAX:
            del self.accept_all[next(iter(self.accept_all))]

    def forget_bad(self, domain: str, since: Time = 0.0) -> None:
        """The refusals that a primary which was not itself gave since then."""
        self.known = {address: (is_good, until) for address, (is_good, until) in self.known.items()
                      if is_good or not address.endswith("@" + domain) or until - BAD_S < since}
        self.rows[domain] = 0, self.rows.get(domain, (0, 0.0))[1]
        self.is_dirty = True

    def knows(self, address: str, now: Time) -> Optional[bool]:
        """Good, bad, or None when nothing is known."""
        is_good, until = self.known.get(address.lower(), (False, 0.0))
        if now < until <= now + (GOOD_S if is_good else BAD_S) + SLACK_S:
            return is_good              # else nothing, or learnt by a clock that was wrong
        return self.takes_all(address.lower().rpartition("@")[2], now) or None

    def takes_all(self, domain: str, now: Time) -> Optional[bool]:
        takes_all, until = self.accept_all.get(domain, (False, 0.0))
        return takes_all if now < until <= now + ACCEPT_ALL_S + SLACK_S else None

    def is_good(self, address: str, now: Time) -> bool:
        """Whether this very recipient was taken before; however far that holds, because a recipient
        known to be good is not refused lightly."""
        is_good, until = self.known.get(address.lower(), (False, 0.0))
        return is_good and until > now

    def is_doubted(self, domain: str, now: Time) -> bool:
        """Five refused in a row, and no good one known: perhaps it refuses everybody who is asked about."""
        refused, good_until = self.rows.get(domain, (0, 0.0))
        return refused >= BAD_ROW and good_until <= now

    def to_values(self, now: Time) -> Dict[str, Any]:
        self.is_dirty = False

        def fresh(known: Dict[str, Tuple[bool, Time]]) -> Dict[str, List[Any]]:
            return {key: list(one) for key, one in known.items() if one[1] > now}
        return {"format": 1, "recipients": fresh(self.known), "accept_all": fresh(self.accept_all)}

    def from_values(self, values: Mapping[str, Any]) -> None:
        """What does not make sense is forgotten."""
        def sound(found: Any) -> Iterator[Tuple[str, bool, Time]]:
            for key, one in found.items() if isinstance(found, dict) else ():
                if (isinstance(one, list) and len(one) == 2 and isinstance(one[0], bool)
                        and type(one[1]) in (int, float) and 0 <= one[1] < TIME_MAX):
                    yield key, one[0], float(one[1])
        for address, is_good, until in sound(values.get("recipients")):
            self._keep(address, is_good, until)
        for domain, takes_all, until in sound(values.get("accept_all")):
            self.accept_all[domain] = takes_all, until


class Greylist:
    """while_up = defer: who comes back is no spammer.  The third try of a client network, sender and
    recipient is taken, if the first was five minutes ago."""

    def __init__(self) -> None:
        self.tries: Dict[Tuple[str, str, str], Tuple[float, int]] = {}      # (monotonic first try, number)

    def is_taken(self, address: str, sender: str, recipient: str, now: Now) -> bool:
        key = (greylist_network(address), sender.lower(), recipient.lower())
        first, count = self.tries.pop(key, (now.mono, 0))
        if now.mono - first > GREYLIST_S:
            first, count = now.mono, 0
        self.tries[key] = (first, count + 1)        # at the end: the oldest are first
        if len(self.tries) > GREYLIST_MAX:
            del self.tries[next(iter(self.tries))]
        return count + 1 >= GREYLIST_TRIES and now.mono - first >= GREYLIST_WAIT_S


class Rate:
    """max_message_rate: messages a minute from one client network."""

    def __init__(self) -> None:
        self.minute = 0
        self.counts: Dict[str, int] = collections.Counter()

    def is_over(self, network: str, most: int, now: Now) -> bool:
        if int(now.mono // 60) != self.minute:
            self.minute = int(now.mono // 60)
            self.counts.clear()
        self.counts[network] += 1
        return self.counts[network] > most


class Destinations:
    """All of them.  Names match whole, or on a dot boundary for `@name`."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.all: Dict[str, Destination] = {}
        self.homes: Dict[str, str] = {}     # primary = etrn, by section: address of the last ETRN

    def get(self, name: str, now: Now) -> Destination:
        found = self.all.get(name)
        if found is None:
            found = self.all[name] = Destination(name, self.config_of(name), now)
            self._set_home(found)
        return found

    def _set_home(self, one: Destination) -> None:
        one.home = self.homes.get(one.cfg.name, "") if one.cfg.primary == "etrn" else ""

    def config_of(self, name: str) -> DomainConfig:
        if is_domain(name):
            return self.cfg.domain(name) or self.cfg.defaults
        route = self.cfg.bounces_route if name.startswith(NOTICES) else self.cfg.alerts_mail_route
        return dataclasses.replace(
            self.cfg.defaults, name=name, primary=(route,) if isinstance(route, Endpoint) else route,
            lifetime=max(self.cfg.defaults.lifetime, NOTICE_LIFETIME_S), recovery_grace=0.0, etrn="none",
            connections=NOTICE_CONNECTIONS, probe_interval=NOTICE_PROBE_S, is_notices=True)

    def name_for(self, kind: str, domain: str) -> str:
        """The destination of a message.  Our own mail to domains not served goes by [bounces] route or
        [alerts] mail_route; alerts to a domain of ours go by that route, too, where it is a smarthost."""
        goes_by_route = kind == "alert" and isinstance(self.cfg.alerts_mail_route, Endpoint)
        if kind == "mail" or (self.cfg.domain(domain) is not None and not goes_by_route):
            return domain
        return (NOTICES if kind == "notice" else ALERTS) + domain

    def meant(self, what: str) -> List[DomainConfig]:
        """The sections that `example.org` or `@example.org` is about; the defaults when it is none of
        ours."""
        below = [cfg for name, cfg in self.cfg.domains.items()
                 if what[:1] == "@" and is_below(name.lstrip("."), what[1:])]
        return below or [self.config_of(what.lstrip("@"))]

    def serves(self, what: str) -> bool:
        """Whether ETRN or a command may name it: served, or for `@name` anything below it served."""
        return any(cfg is not self.cfg.defaults for cfg in self.meant(what))

    def matching(self, what: str) -> List[Destination]:
        """Those that `example.org`, `@example.org`, `all` or a queue ID means."""
        if what == "all":
            return list(self.all.values())
        if what[:1] == "@":
            return [one for name, one in self.all.items() if is_below(name, what[1:])]
        return [self.all[name] for name in (what, NOTICES + what, ALERTS + what) if name in self.all] or [
            one for one in self.all.values() if what in one.entries]

    def collected_by(self, username: str, domains: Sequence[str], now: Now) -> List[Destination]:
        """The destinations that an ATRN collects: these domains, or all that are the customer's."""
        known = [name for name in [*self.cfg.domains, *self.all]
                 if self.cfg.is_owned(name, username) and name[0] != "." and is_domain(name)]
        return [self.get(name, now) for name in dict.fromkeys(domains or known)]

    def move(self, cfg: DomainConfig, address: str, now: Now) -> List[Destination]:
        """primary = etrn: an authenticated ETRN says where a section's primary is now.  Returns those
        it moves."""
        self.homes[cfg.name] = address
        moved = [one for one in self.all.values() if one.cfg.name == cfg.name and one.home != address]
        for one in moved:
            one.home, one.last_error = address, ""
            one.on_left(now)
        return moved

    def reconfigure(self, cfg: Config, now: Now) -> List[Destination]:
        """SIGHUP.  A longer or shorter lifetime holds for queued mail, too.  Returns those with another
        primary now."""
        self.cfg = cfg
        changed = []
        for one in self.all.values():
            old, one.cfg = one.cfg.primary, self.config_of(one.name)
            self._set_home(one)
            if one.cfg.primary != old or (one.waits_for and one.state is Primary.DOWN):
                one.on_left(now)
                changed.append(one)
            one.limit, one.most = min(one.limit, one.cfg.connections), min(one.most, one.cfg.connections)
            one.next_try = min(one.next_try, now.mono + one.cfg.probe_interval)
            for entry in one.entries.values():
                one.set_deadline(entry, now)
        return changed

    def sums(self) -> Tuple[int, int, int]:
        """Messages, octets and held ones."""
        every = self.all.values()
        return (sum(len(one.entries) for one in every), sum(one.octets for one in every),
                sum(len(one.by_state[State.HELD]) for one in every))


# == 10. DNS ===================================================================
# Packets built and parsed (pure), then a short resolver that sends them and
# waits, so it runs in threads.  Uses 2 LIMITS, 3 GRAMMAR, and Endpoint of 4.
# RFC 1035, RFC 5452.  No EDNS: some servers drop such questions, and an answer
# that is too long for 512 octets comes over TCP.

A, CNAME, PTR, MX, AAAA = 1, 5, 12, 15, 28
NXDOMAIN = 3
RESOLV_CONF = "/etc/resolv.conf"        # alone means the system's resolver, with /etc/hosts


class DnsError(Exception):
    """No usable answer.  For the primary's mail this is always temporary."""


class NoSuchName(DnsError):
    """A server says so."""


class Truncated(DnsError):
    """The whole answer comes by TCP."""


class Answer(NamedTuple):
    records: List[Any]          # A, AAAA: address; MX: (preference, host); PTR: host
    name: str                   # their owner: the name asked for, or the last alias in the packet


def format_query(id: int, name: str, kind: int) -> bytes:
    """Raises DnsError: an alias may hold anything."""
    labels = name.split(".")
    if not name.isascii() or len(name) > DOMAIN_MAX or not all(0 < len(one) < 64 for one in labels):
        raise DnsError("not a name: %s" % printable(name, 100))
    question = b"".join(bytes([len(one)]) + one.encode("ascii") for one in labels)
    return struct.pack("!HHHHHH", id, 0x0100, 1, 0, 0, 0) + question + struct.pack("!BHH", 0, kind, 1)


def _octets(packet: bytes, at: int, size: int) -> bytes:
    if at + size > len(packet):
        raise DnsError("a record runs out of the packet")
    return packet[at:at + size]


def parse_name(packet: bytes, at: int) -> Tuple[str, int]:
    """The name at an offset and the offset behind it.  Pointers must lead
    backwards, so that no packet makes a loop.  Raises DnsError."""
    labels: List[str] = []
    behind, lowest, length = 0, at, 0
    while True:
        size = _octets(packet, at, 1)[0]
        if size >= 0xc0:
            target = struct.unpack("!H", _octets(packet, at, 2))[0] & 0x3fff
            if target >= lowest:
                raise DnsError("a pointer does not lead backwards")
            behind, at, lowest = behind or at + 2, target, target
            continue
        length += size + 1
        if size > 63 or length > 256:
            raise DnsError("a name is too long or of an unknown kind")
        label = _octets(packet, at + 1, size)
        at += size + 1
        if not size:
            return ".".join(labels), behind or at
        labels.append(label.decode("ascii", "backslashreplace").lower())


def parse_answer(packet: bytes, id: int, name: str, kind: int) -> Optional[Answer]:
    """None when it bears another ID, because anybody may have sent it (RFC 5452
    9.1).  Aliases are followed within the packet.  Raises DnsError: no such
    name, or the server's own answer is of no use."""
    if packet[:2] != struct.pack("!H", id):
        return None
    flags, questions, answers = struct.unpack("!HHH", _octets(packet, 2, 10)[:6])
    rcode = flags & 15
    if flags & 0x8000 and rcode and not questions:      # a bare header: whatever it says, it names nobody
        raise DnsError("error code %d" % rcode)
    asked, at = parse_name(packet, 12)
    question = struct.pack("!HH", kind, 1)
    if not flags & 0x8000 or questions != 1 or asked != name.lower() or packet[at:at + 4] != question:
        raise DnsError("answer to another question")
    if flags & 0x0200:
        raise Truncated("a truncated answer")
    if rcode == NXDOMAIN:
        raise NoSuchName("no such name: %s" % name)
    if rcode:
        raise DnsError("error code %d" % rcode)
    at += 4
    found: Dict[Tuple[str, int], List[Any]] = {}
    for _ in range(min(answers, DNS_RECORDS_MAX)):
        owner, at = parse_name(packet, at)
        its_kind, its_class, _, size = struct.unpack("!HHIH", _octets(packet, at, 10))
        at += 10 + len(_octets(packet, at + 10, size))
        if its_class == 1 and its_kind in (kind, CNAME):
            found.setdefault((owner, its_kind), []).append(_parse_data(packet, at - size, size, its_kind))
    for _ in range(DNS_CNAMES_MAX + 1):
        if (asked, kind) in found or (asked, CNAME) not in found:
            return Answer(found.get((asked, kind), []), asked)
        asked = found[asked, CNAME][0]
    raise DnsError("its aliases have no end")


def _parse_data(packet: bytes, at: int, size: int, kind: int) -> Any:
    if (kind == A and size != 4) or (kind == AAAA and size != 16) or (kind == MX and size < 3):
        raise DnsError("record data of a wrong size")
    if kind in (A, AAAA):
        return str(ipaddress.ip_address(packet[at:at + size]))
    if kind == MX:
        return struct.unpack("!H", packet[at:at + 2])[0], parse_name(packet, at + 2)[0]
    return parse_name(packet, at)[0]


def socket_address(host: str, port: int) -> Tuple[int, Any]:
    """The family of an IP address, and what connect() and bind() take, with the
    number of its zone (`fe80::1%eth0`).  Raises OSError, also for an unknown zone."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    return found[0][0], found[0][4]


def read_resolv_conf(path: str) -> Endpoints:
    """The nameservers of a resolv.conf; none is this host, as resolv.conf(5) says."""
    lines: List[List[str]] = []
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        lines += map(str.split, file)
    found = [Endpoint(words[1], 53) for words in lines
             if words[:1] == ["nameserver"] and is_address("".join(words[1:2]))]
    return tuple(found[:3]) or (Endpoint("127.0.0.1", 53),)


class Resolver:
    """Asks the nameservers in turn, two rounds; keeps nothing."""

    def __init__(self, nameservers: Union[str, Sequence[Endpoint]]) -> None:
        self.nameservers = nameservers          # or the path of a file like resolv.conf

    def query(self, name: str, kind: int, seconds: Optional[float] = None) -> List[Any]:
        """Records, or an empty list when the name has none of that kind.
        Raises DnsError: no such name, or nobody answers."""
        end, asked = time.monotonic() + (seconds or DNS_TOTAL_S), name.lower()
        for _ in range(DNS_CNAMES_MAX):
            answer = self._ask(asked, kind, end)
            if answer.records or answer.name == asked:
                return answer.records
            asked = answer.name         # an alias alone: ask again, RFC 1034 5.2.2
        raise DnsError("DNS lookup of %s failed: its aliases have no end" % name)

    def _ask(self, name: str, kind: int, end: float) -> Answer:
        """The first usable answer.  A server that fails is not waited for."""
        named, problem = self.nameservers, "no answer"
        servers = read_resolv_conf(named) if isinstance(named, str) else named
        for server in [*servers, *servers]:
            if time.monotonic() >= end:
                break
            for is_stream in (False, True):
                try:
                    return _exchange(server, name, kind, end, is_stream)
                except NoSuchName:
                    raise
                except (OSError, DnsError) as error:
                    problem = "%s: %s" % (server, error)
                    if not isinstance(error, Truncated):
                        break
        raise DnsError("DNS lookup of %s failed: %s" % (name, problem))

    def addresses(self, host: str) -> List[str]:
        """At least one, IPv4 first: hosts with broken IPv6 are common.  Raises DnsError."""
        if is_address(host):
            address, percent, zone = host.partition("%")
            return [str(ipaddress.ip_address(address)) + percent + zone]
        try:
            host = parse_domain(host)
        except ValueError:              # an MX record may hold any octets
            raise DnsError("not a host name: %s" % printable(host, 100)) from None
        out: List[str] = []
        problem = DnsError("no address is known for %s" % host)
        if self.nameservers == RESOLV_CONF:
            try:
                out += [socket.getnameinfo(entry[4], socket.NI_NUMERICHOST)[0]      # with its zone
                        for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
            except (OSError, UnicodeError) as error:
                problem = DnsError("lookup of %s failed: %s" % (host, error))
        for kind in () if self.nameservers == RESOLV_CONF else (A, AAAA):
            try:                # many a server knows the one and never answers for the other
                out += self.query(host, kind, DNS_TRY_S if out else None)
            except DnsError as error:
                problem = error
        if not out:
            raise problem
        return sorted(dict.fromkeys(out), key=lambda address: ":" in address)

    def name_of(self, address: str) -> str:
        """The name of a client where it leads back to the address, else empty.
        Raises DnsError when that cannot be known now."""
        bare = parse_address(address)
        try:
            for name in self.query(bare.reverse_pointer, PTR, DNS_TRY_S)[:3]:
                host = parse_domain(name)
                if str(bare) in self.query(host, A if bare.version == 4 else AAAA, DNS_TRY_S):
                    return host
        except (ValueError, NoSuchName):
            pass                        # it has none, or not that of a host
        return ""


def _exchange(server: Endpoint, name: str, kind: int, end: float, is_stream: bool) -> Answer:
    """One question from a fresh socket, and so from a fresh port (RFC 5452 9.2).
    In TCP each message stands behind its length, RFC 1035 4.2.2."""
    end = min(end, time.monotonic() + DNS_TRY_S)
    id, data = secrets.randbits(16), b""
    query = format_query(id, name, kind)
    family, address = socket_address(*server)
    with socket.socket(family, socket.SOCK_STREAM if is_stream else socket.SOCK_DGRAM) as sock:
        sock.settimeout(max(0.001, end - time.monotonic()))
        sock.connect(address)
        sock.sendall(struct.pack("!H", len(query)) + query if is_stream else query)
        while time.monotonic() < end:
            sock.settimeout(max(0.001, end - time.monotonic()))
            block = sock.recv(65535)
            data = data + block if is_stream else struct.pack("!H", len(block)) + block
            if len(data) >= 2 and len(data) >= 2 + struct.unpack("!H", data[:2])[0]:
                answer = parse_answer(data[2:], id, name, kind)
                if answer is not None:
                    return answer
            if not block:
                break
    raise DnsError("no whole answer came")


# == 11. DSN ===================================================================
# Verdicts in, the octets of a delivery status notification out: RFC 3461 to
# 3464, 3834, 6533.  Pure; uses 2 LIMITS, 3 GRAMMAR, and Verdict of 9.  Foreign
# text is escaped and cut: no strange server puts a header or a part into it.

Told = List[Tuple[Verdict, Mapping[str, Any]]]      # each with its recipient in the sidecar

_TEXTS = {      # action: (subject, how the text begins)
    "failed": ("Undelivered Mail Returned to Sender", "Your message of %s could not be delivered to:"),
    "delayed": ("Delayed Mail (still being retried)",
                "Your message of %s has not been delivered yet to the addresses below.  You need not "
                "send it again: it is kept here and will be delivered as soon as possible to:"),
    "relayed": ("Mail relayed",
                "Your message of %s was handed on to a mail server that sends no confirmations:")}
_NO_SENDER = "For the postmaster: a message of %s, which has no sender to be told, could not be delivered to:"


def format_notice(hostname: str, target: str, sidecar: Mapping[str, Any], action: str,
                  verdicts: Sequence[Verdict], original: bytes, full: bool, now: Time,
                  boundary: str, message_id: str) -> bytes:
    """The message to `target`.  `action` is failed, delayed or relayed.
    `original` is the header of the message it tells of, or all of that when `full`."""
    boundary = ("%s/%s" % (boundary, hostname))[:70]                # RFC 2046 5.1.1
    people = {one["address"]: one for one in sidecar["recipients"]}
    told = []
    for one in verdicts:        # RFC 3464 2.3.4: a delayed one has not failed, also where a 5xx was kept
        status = one.status or "5.0.0"
        status = {"failed": status, "delayed": "4" + status[1:], "relayed": "2.0.0"}[action]
        told.append((one._replace(status=status), people[one.address]))
    text = _explain(hostname, sidecar, action, told, now)
    # RFC 6533's types only where they are needed, because many programs read the old ones alone
    is_global = any(not (one.address + person["orcpt"]).isascii() for one, person in told)
    has_global = sidecar["smtputf8"] and not original.partition(b"\r\n\r\n")[0].isascii()
    returned = {(True, True): "message/global", (True, False): "message/rfc822",
                (False, True): "message/global-headers", (False, False): "text/rfc822-headers"}
    if not full:                # lines that fit into mail, RFC 5322 2.1.1
        original = re.sub(rb"[^\r\n]{%d}(?=[^\r\n])" % LINE_MAX, b"\\g<0>\r\n ", original)
    parts = [
        ("Notification", "text/plain; charset=" + ("us-ascii" if text.isascii() else "utf-8"), text),
        ("Delivery report", "message/global-delivery-status" if is_global else "message/delivery-status",
         _status_part(hostname, sidecar, action, told)),
        ("Undelivered Message" if full else "Undelivered Message Headers",
         returned[full, has_global], original)]
    out = _fields([
        "From: Mail Delivery System <MAILER-DAEMON@%s>" % hostname,
        "To: <%s>" % target if len(target.encode()) < FIELD_MAX else "To: undisclosed-recipients:;",
        "Subject: " + _TEXTS[action][0], "Date: " + format_date(int(now)),
        "Message-ID: <%s@%s>" % (message_id, hostname),
        "Auto-Submitted: auto-replied", "MIME-Version: 1.0",
        'Content-Type: multipart/report; report-type=delivery-status;\r\n\tboundary="%s"' % boundary],
        b"".join(data for _, _, data in parts)) + b"This is a MIME-encapsulated message.\r\n"
    for description, content_type, data in parts:
        out += _fields(["\r\n--" + boundary, "Content-Description: " + description,
                        "Content-Type: " + content_type], data) + data
    return out + ("\r\n--%s--\r\n" % boundary).encode("ascii")


def _fields(lines: List[str], data: bytes) -> bytes:
    """The header before `data`."""
    encoding = [] if data.isascii() else ["Content-Transfer-Encoding: 8bit"]
    return "\r\n".join([*lines, *encoding, "", ""]).encode("utf-8")


def _escape(text: str, longest: int = RESPONSE_MAX, plain: str = " -~") -> str:
    """One line of ASCII, cut.  What is not `plain` becomes \\x{HEX}, RFC 6533 3."""
    text = text if len(text) <= longest else text[:longest] + "..."
    return re.sub("[^%s]" % plain, lambda match: "\\x{%02X}" % ord(match.group()), text)[:FIELD_MAX]


def _wrap(text: str, first: str = "", rest: str = "") -> List[str]:
    return textwrap.wrap(text, FOLD_WIDTH, initial_indent=first, subsequent_indent=rest,
                         break_long_words=False, break_on_hyphens=False)


def _status_part(hostname: str, sidecar: Mapping[str, Any], action: str, told: Told) -> bytes:
    """RFC 3464 2: the fields of the message, then those of each recipient, without the empty ones."""
    groups = [[("Reporting-MTA", "dns; " + hostname),
               ("Original-Envelope-Id", _escape(decode_xtext(sidecar["envid"]))),
               ("X-Relay-Queue-ID", sidecar["id"]),
               ("Arrival-Date", format_date(int(sidecar["received"])))]]
    for verdict, person in told:
        is_ascii, last = verdict.address.isascii(), person["last_attempt"]
        kind, _, original = person["orcpt"].partition(";")
        if kind.lower() != "utf-8":     # this type has an encoding of its own, which stays
            original = decode_xtext(original)
        # Words of our own have a type of our own, RFC 3464 2.3.6.  The field is folded, RFC 5322 2.2.3.
        said = "smtp; " if re.match(r"[2-5]\d\d[ -]", verdict.response) else "X-etrn-relay; "
        said = verdict.response and said + _escape(verdict.response)
        groups.append([
            ("Original-Recipient", kind and "%s; %s" % (_escape(kind), _escape(original, FIELD_MAX))),
            ("Final-Recipient", "rfc822; " + _escape(verdict.address, FIELD_MAX) if is_ascii else
             "utf-8; " + _escape(verdict.address, FIELD_MAX, r"!-*,-<>-\[\]-~")),     # utf-8-addr-xtext
            ("Action", action), ("Status", _escape(verdict.status)),
            ("Remote-MTA", verdict.remote and "dns; " + _escape(verdict.remote, 255)),
            ("Diagnostic-Code", "\r\n".join(_wrap(said, " " * len("Diagnostic-Code: "), " ")).lstrip(" ")),
            ("Last-Attempt-Date", format_date(int(last)) if last else ""),
            ("Will-Retry-Until", format_date(int(person["expires"])) if action == "delayed" else "")])
    return "\r\n".join("".join("%s: %s\r\n" % field for field in group if field[1])
                       for group in groups).encode("ascii")


# What a status or an error means and what its reader can do, for people who do not know SMTP.
# Searched in this order in "STATUS RESPONSE", where STATUS is the peer's own when it gave one.  The
# rows without a status know our own error texts, and the system's; a test looks for each in this file.
_ASK = "Reach the addressee in another way, for example by telephone, and ask."
_AGAIN = "If it still matters, send it again later, or reach the addressee in another way."
_MEANINGS: Tuple[Tuple[str, str, str], ...] = (
    (r"^[45]\.1\.(?:[0136]|10)\b", "There is no such mailbox at this domain.",
     "Compare the address letter by letter with the right one; " + _ASK[0].lower() + _ASK[1:]),
    (r"^[45]\.2\.2\b", "The addressee's mailbox is full.",
     "Tell the addressee in another way, and send it again later."),
    (r"^[45]\.2\.1\b", "The addressee's mailbox takes no mail.", _ASK),
    (r"^[45]\.(?:3\.4|2\.3)\b", "The message is larger than the addressee's mail server takes.",
     "Send it in smaller parts, or large files in another way."),
    (r"^[45]\.6\.7\b", "It or an address in it has letters that the mail server cannot handle.",
     "Use an address in plain letters (a to z) for the sender and the addressee."),
    ("Connection refused", "The addressee's computer is there, but its mail service is not running.", _AGAIN),
    ("timed out", "The addressee's mail server does not answer.", _AGAIN),
    ("unreachable|No route to host", "The addressee's mail server cannot be reached.", _AGAIN),
    ("no such name|lookup of|no address is known", "The addressee's mail server cannot be found.", _AGAIN),
    ("loops back", "No mail server is known for this domain other than its backup servers.", _AGAIN),
    ("null MX", "The domain declares that it takes no mail.", _ASK),
    ("lost connection|was cut|is not SMTP|endless reply|not asked for",
     "The addressee's mail server broke the conversation off.", _AGAIN),
    ("Returned by the postmaster", "The postmaster of the backup mail server returned it.", _AGAIN),
    (r"^[45]\.7\.\d", "The addressee's mail server does not want this message, or its sender.", _ASK),
    (r"^4|^\S+ 4\d\d[ -]", "The addressee's mail server put the message off again and again.", _AGAIN),
    ("", "The addressee's mail server refused the message.", _ASK),
)


def meaning_of(verdict: Verdict) -> Tuple[str, str]:
    """In words: what happened, and what to do about it."""
    own = re.match(r"[45]\d\d ([45]\.\d{1,3}\.\d{1,3})\b", verdict.response)
    text = "%s %s" % (own.group(1) if own else verdict.status, verdict.response)
    return next((why, what) for pattern, why, what in _MEANINGS if re.search(pattern, text))


def _explain(hostname: str, sidecar: Mapping[str, Any], action: str, told: Told, now: Time) -> bytes:
    """For a reader who does not know SMTP."""
    opening = _TEXTS[action][1] if sidecar["sender"] else _NO_SENDER
    out, age = _wrap(opening % format_date(int(sidecar["received"]))), format_age(now - sidecar["received"])
    for verdict, person in told:
        count, last, lines = person["attempts"], person["last_attempt"], []
        if action != "relayed":
            collected = " to be collected" if verdict.response == UNCOLLECTED else ""
            when = ", the last time on " + format_date(int(last)) if last else ""
            lines = [meaning_of(verdict)[0],
                     "It was tried for %s (%s%s)." % (age, plural(count, "attempt"), when) if count else
                     "It waited for %s%s." % (age, collected)]
        if action == "delayed":
            lines.append("It will be tried until %s." % format_date(int(person["expires"])))
        if verdict.response:
            lines.append("The mail server %s said:" % _escape(verdict.remote, 255) if verdict.remote else
                         "The last result was:")
        out += ["", "  <%s>" % printable(verdict.address, 240)[:240]]       # 960 octets at most
        out += [part for line in lines for part in _wrap(line, "    ", "    ")]
        out += _wrap(_escape(verdict.response), "      ", "      ")
    if action == "failed" and sidecar["sender"]:
        out += ["", "It will not be tried again."]
        for advice in dict.fromkeys(meaning_of(verdict)[1] for verdict, _ in told):
            out += _wrap(advice)
    whose = "This notice was made by %s, a backup mail server of the addressee's domain."
    out += ["", *_wrap(whose % hostname)]
    return "".join(line + "\r\n" for line in out).encode("utf-8")


# == 12. DELIVERY ==============================================================
# The way to a primary and the talk with it.  dial() finds the route, connects,
# and does with smtplib what comes before the mail, in a thread.  After that the
# connection is the loop's, and each transaction is a generator, an exchange, that
# yields command groups and is sent the replies.  No message goes behind a final dot.
# Uses 2 LIMITS, 3 GRAMMAR, 4 CONFIG, 6 LOOP, 9 SCHEDULE, 10 DNS.

class PeerError(Exception):
    """The connection is of no more use.  Always temporary for the mail.  Without a text: a message on it
    was not tried, and goes again at once."""

    def __init__(self, text: str, closing: bool = False) -> None:
        super().__init__(text)
        self.closing = closing          # the peer said so, with 421, and read nothing behind that
        self.replies: List[Said] = []   # that came before it to the group under way


class TlsError(PeerError):
    """STARTTLS was offered but did not come about: `may` allows a new connection in the clear."""


class Dial:
    """A dial() on its way.  Its sockets are the thread's; the loop may only shut them down, and that
    until TLS begins: a server that hangs behind it keeps the thread for COMMAND_S."""
    __slots__ = ("began", "is_given_up", "sockets")

    def __init__(self, began: float = 0.0) -> None:
        self.began = began              # monotonic
        self.is_given_up = False        # it counts no longer: the primary is another one, or it hangs
        self.sockets: List[socket.socket] = []

    def cut(self) -> None:
        self.is_given_up = True
        for sock in self.sockets:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)      # SSLSocket's own would drop its TLS


class Plan(NamedTuple):
    """All that dial() needs to know; nothing in it changes."""
    name: str                           # of the destination
    cfg: DomainConfig
    primary: Hosts
    hostname: str
    resolver: Resolver
    listeners: Endpoints                # ours, as bound
    last_route: Tuple[Hop, ...]         # used when the DNS fails
    login: Optional[Tuple[str, str]] = None     # at a smarthost
    mine: Optional[Dial] = None         # for the loop to cut


# -- routes

def is_own(hop: Hop, listeners: Sequence[Endpoint]) -> bool:
    """Whether connecting there would reach this relay itself."""
    for listener in listeners:
        if listener == Endpoint(hop.address, hop.port):
            return True
        if listener.port == hop.port and listener.host in ("0.0.0.0", "::"):
            with contextlib.suppress(OSError):
                family, where = socket_address(hop.address, 0)
                with socket.socket(family, socket.SOCK_DGRAM) as sock:
                    sock.bind(where)    # possible with an address of this machine only
                return True
    return False


def find_route(plan: Plan) -> Tuple[List[Hop], str]:
    """Hosts to try in order, and a warning when they are remembered ones.  Raises PeerError: whatever
    the DNS says, the mail is kept."""
    if plan.primary in WAITS:
        raise PeerError("mail for %s %s" % (plan.name, WAITS[plan.primary]))
    try:
        return find_hops(plan, plan.name.partition(":")[2] or plan.name)[:ROUTE_HOSTS_MAX], ""
    except DnsError as error:
        if plan.last_route:
            return list(plan.last_route), "%s; using the route that worked last" % error
        raise PeerError(str(error)) from None


def find_hops(plan: Plan, domain: str) -> List[Hop]:
    """Never this host and, among MX hosts, nothing of equal or higher preference, RFC 5321 5.1.  Notices,
    whose targets strangers choose, go to public addresses only."""
    is_mx, hops = isinstance(plan.primary, str), []
    problem: Exception = PeerError("mail for %s loops back to this host" % domain)
    for hosts in find_hosts(plan, domain):
        equal = []
        for host, port in hosts:
            try:
                equal += [Hop(host, address, port) for address in plan.resolver.addresses(host)]
            except DnsError as error:
                problem = error
        is_here = any(is_own(hop, plan.listeners) for hop in equal)
        if is_mx and (is_here or plan.hostname in [host for host, _ in hosts]):
            break
        hops += equal if not is_here else []
        if len(hops) >= ROUTE_HOSTS_MAX:
            break
    if not hops:
        raise problem
    if is_mx and plan.cfg.is_notices:
        hops = [hop for hop in hops if parse_address(hop.address).is_global]
        if not hops:
            raise PeerError("mail for %s has no route to a public address" % domain)
    return hops


def find_hosts(plan: Plan, domain: str) -> Iterable[List[Endpoint]]:
    """Those of equal preference together, in random order; the best first."""
    if not isinstance(plan.primary, str):
        return [[host] for host in plan.primary]
    if domain.startswith("["):
        return [[Endpoint(parse_literal(domain), SMTP_PORT)]]
    found: List[Tuple[int, str]] = plan.resolver.query(domain, MX)
    records = [one for one in found if one[1]]
    if found and not records:           # RFC 7505
        raise PeerError("%s has a null MX record: it says it takes no mail" % domain)
    groups: Dict[int, List[Endpoint]] = {}
    for preference, host in random.sample(records, len(records)) or [(0, domain)]:
        groups.setdefault(preference, []).append(Endpoint(host, SMTP_PORT))
    return [hosts for _, hosts in sorted(groups.items())]


# -- dialling, in a thread

def begin_connect(hop: Hop, mine: Dial) -> socket.socket:
    """A socket on its way to a host.  A peer that dies without a word is noticed within a minute."""
    family, where = socket_address(hop.address, hop.port)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE:
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        code = sock.connect_ex(where)
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, os.strerror(code))
    except OSError:
        sock.close()
        raise
    mine.sockets.append(sock)
    return sock


def connect_each(hops: Sequence[Hop],
                 mine: Optional[Dial] = None) -> Iterator[Tuple[Hop, Union[socket.socket, OSError]]]:
    """Hosts in order, each with a connected socket or the reason why not.  One that does not answer is
    not waited for: the next is tried beside it after a moment (RFC 8305 5)."""
    mine, waiting, end = mine or Dial(), list(hops), 0.0
    with selectors.DefaultSelector() as selector:
        try:
            while (waiting or selector.get_map()) and not mine.is_given_up:
                if waiting:
                    hop, end = waiting.pop(0), time.monotonic() + CONNECT_S
                    try:
                        selector.register(begin_connect(hop, mine), selectors.EVENT_WRITE, hop)
                    except OSError as error:
                        yield hop, error
                        continue
                pause = end - time.monotonic()
                if waiting:
                    pause = STAGGER_S if waiting[0].host == hop.host else HOST_STAGGER_S
                for key, _ in selector.select(max(0.0, pause)):
                    sock: Any = key.fileobj
                    selector.unregister(sock)
                    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if code:
                        sock.close()
                    yield key.data, OSError(code, os.strerror(code)) if code else sock
                if not waiting and time.monotonic() >= end:
                    for key in selector.get_map().values():
                        yield key.data, OSError(errno.ETIMEDOUT, "Connection timed out")
                    return
        finally:
            for key in selector.get_map().values():
                key.fileobj.close()     # type: ignore[union-attr]


Said = Tuple[int, bytes]                # a reply: code and text


class Replies:
    """A peer's replies, read strictly: smtplib takes garbage for codes like -1, and reads a reply that
    never ends."""
    _LINE = re.compile(rb"[2-5][0-9][0-9](?:[ -]|$)")

    def __init__(self, host: str) -> None:
        self.host, self.pending = host, b""
        self.lines: List[bytes] = []    # of the reply under way
        self.octets = 0

    def feed(self, data: bytes) -> Iterator[Said]:
        """Whole replies, as they come.  Raises PeerError."""
        *lines, self.pending = (self.pending + data).split(b"\n")
        for line in lines:
            line = line.rstrip(b"\r")
            self.lines.append(line)
            self.octets += len(line)
            if self.octets > REPLY_OCTETS_MAX or len(self.lines) > REPLY_LINES_MAX:
                raise PeerError("endless reply from %s" % self.host)
            if not self._LINE.match(line) or line[:3] != self.lines[0][:3]:
                shown = printable(line[:100].decode("latin-1"))
                raise PeerError("reply of %s is not SMTP: %s" % (self.host, shown))
            if line[3:4] != b"-":
                text = b"\n".join([one[4:] for one in self.lines])
                self.lines, self.octets = [], 0
                yield int(line[:3]), text
        if self.octets + len(self.pending) > REPLY_OCTETS_MAX:
            raise PeerError("endless reply from %s" % self.host)


def reply_text(code: int, text: bytes) -> str:
    return printable("%d %s" % (code, text.decode("utf-8", "replace").replace("\n", " ")), RESPONSE_MAX)


def unfit(what: str, code: int, text: bytes) -> PeerError:
    """For a reply after which the connection is of no more use."""
    return PeerError("%s: %s" % (what, reply_text(code, text)), code == 421)


def own_status(code: int, text: bytes) -> str:
    """The reply's own enhanced status (RFC 2034), when it is of its class; else empty."""
    match = re.match(rb"([245]\.\d{1,3}\.\d{1,3})(?![\d.])", text)
    return match.group(1).decode("ascii") if match and match.group(1)[0] == ord(str(code)[0]) else ""


def reply_status(code: int, text: bytes) -> str:
    return own_status(code, text) or "%d.0.0" % (code // 100)


def is_no_such_user(code: int, text: bytes) -> bool:
    """Whether a refusal of RCPT is about the recipient; others are about the sender, policy, us, or the
    day."""
    status = own_status(code, text)
    return status in NO_SUCH_USER if code // 100 == 5 and status else code in (550, 551, 553)


class Dialer(smtplib.SMTP):
    """smtplib's client for greeting, EHLO, STARTTLS and AUTH, in a thread, with a deadline and a bounded
    size for each reply.  Addresses never pass through it: quoteaddr() would rewrite them."""

    def __init__(self, hostname: str, hop: Hop, sock: socket.socket) -> None:
        super().__init__(local_hostname=hostname)       # without a host it does not connect
        self.hop, self.sock, self.end = hop, sock, 0.0
        self.greeting = ""
        self.replies = Replies(hop.host)
        self.whole: Deque[Said] = collections.deque()       # came, and are not yet asked for

    def set_deadline(self, seconds: float) -> None:
        """For the next command and its reply."""
        assert self.sock is not None
        self.sock.settimeout(seconds)
        self.end = time.monotonic() + seconds

    def getreply(self) -> Said:
        assert self.sock is not None
        while not self.whole:
            left = self.end - time.monotonic()
            if left <= 0:
                raise PeerError("conversation with %s timed out" % self.hop.host)
            self.sock.settimeout(left)
            try:
                data = self.sock.recv(RECEIVE_OCTETS)
            except socket.timeout:
                continue
            if not data:
                raise PeerError("lost connection with %s" % self.hop.host)
            self.whole.extend(self.replies.feed(data))
        return self.whole.popleft()

    def ask(self, command: str, seconds: Optional[float] = None) -> Said:
        self.set_deadline(seconds or COMMAND_S)
        code, text = self.docmd(command)
        if code == 421:
            raise unfit(str(self.hop), code, text)
        return code, text

    def open(self, policy: str, login: Optional[Tuple[str, str]] = None, early: bytes = b"") -> None:
        """`early`: octets that came before.  Raises PeerError, always temporary for the mail, or
        OSError.  A 5xx greeting says nothing about the mail."""
        is_smtps = login is not None and self.hop.port == SMTPS_PORT
        self.set_deadline(COMMAND_S)
        self.whole.extend(self.replies.feed(early))
        if is_smtps:                    # RFC 8314 3.3
            self._wrap(policy)
        code, text = self.getreply()
        self.greeting = reply_text(code, text)
        if code != 220:
            raise unfit("%s refused to talk to us" % str(self.hop), code, text)
        if text.split(b" ")[0].decode("ascii", "replace").lower() == self.local_hostname.lower():
            raise PeerError("mail loops back to this host: %s greets with our own name" % str(self.hop))
        self.hello()
        if not is_smtps:
            self.secure(policy)
        if login is not None:
            self.log_in(*login)

    def hello(self) -> None:
        """What was offered before is forgotten."""
        self.set_deadline(COMMAND_S)
        code, text = self.ehlo()
        if code >= 500:
            code, text = self.helo()    # RFC 5321 3.2
        if code != 250:
            raise unfit("host %s refused our greeting" % self.hop.host, code, text)

    def secure(self, policy: str) -> None:
        """STARTTLS as the `tls` option says."""
        is_offered = "starttls" in self.esmtp_features
        if policy == "none" or (policy == "may" and not (is_offered and ssl)):
            return
        if ssl is None:
            raise PeerError("tls = %s, but this Python has no ssl module" % policy)
        if not is_offered:
            name = policy.partition(":")[0]
            raise PeerError("%s does not offer STARTTLS, and tls = %s" % (self.hop.host, name))
        try:
            code, text = self.ask("STARTTLS")
            if code != 220:
                raise TlsError("%s answers STARTTLS with %s" % (self.hop.host, reply_text(code, text)))
            if self.whole or self.replies.pending:      # injected, to be taken for a reply within TLS
                raise TlsError("%s sends data behind its STARTTLS reply" % self.hop.host)
            self._wrap(policy)
            self.hello()                # RFC 3207 4.2; and TLS 1.3 shows only now that it did not agree
        except (PeerError, OSError) as error:       # STARTTLS broke the connection
            if isinstance(error, TlsError) or getattr(error, "closing", False):
                raise
            raise TlsError("STARTTLS: %s" % error) from None

    def _wrap(self, policy: str) -> None:
        """Certificates are verified only where the option says so: as between mail servers everywhere,
        opportunistic TLS is against eavesdropping, not against impersonation."""
        assert self.sock is not None
        host = self.hop.host
        try:
            context = ssl.create_default_context()
            if policy != "verify":
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            self.sock.settimeout(CONNECT_S)
            self.sock = wrapped = context.wrap_socket(self.sock, server_hostname=host)
        except (OSError, ValueError) as error:
            raise TlsError("TLS with %s failed: %s" % (host, printable(str(error), 200))) from None
        found = hashlib.sha256(wrapped.getpeercert(binary_form=True) or b"").hexdigest()
        if policy.startswith("sha256:") and found != policy[7:]:
            raise PeerError("the certificate of %s is not the pinned one: sha256:%s" % (host, found))

    def log_in(self, username: str, password: str) -> None:
        """AUTH at a smarthost, RFC 4954, in UTF-8 as RFC 4616 2 has it.  What it answers says nothing
        about the mail."""
        def encode(text: str) -> str:
            return base64.b64encode(text.encode("utf-8")).decode("ascii")
        offered = self.esmtp_features.get("auth", "").upper().split()
        if "PLAIN" in offered:
            code, text = self.ask("AUTH PLAIN " + encode("\0%s\0%s" % (username, password)))
        elif "LOGIN" in offered:
            code, text = self.ask("AUTH LOGIN " + encode(username))
            if code == 334:
                code, text = self.ask(encode(password))
        elif "CRAM-MD5" in offered:
            code, text = self.ask("AUTH CRAM-MD5")
            if code == 334:
                digest = hmac.new(password.encode("utf-8"), base64.b64decode(text), "md5").hexdigest()
                code, text = self.ask(encode("%s %s" % (username, digest)))
        else:
            raise PeerError("AUTH at %s failed: it offers none of PLAIN, LOGIN, CRAM-MD5" % self.hop.host)
        if code != 235:
            raise unfit("AUTH at %s failed" % self.hop.host, code, text)


def read_secret(password: str) -> str:
    """A password option: itself, or the content of the file it names.  Raises OSError."""
    if not password.startswith("file:"):
        return password
    try:
        with open(password[5:], encoding="utf-8") as file:
            return file.read().strip()
    except UnicodeDecodeError:
        raise OSError(0, "%s: not UTF-8" % password[5:]) from None


class Dialled(NamedTuple):
    """What came of dial().  Without a client `error` says why; that is never a word about the mail."""
    client: Optional[Dialer]
    error: str = ""
    hops: Tuple[Hop, ...] = ()          # the route
    warning: str = ""


def dial(plan: Plan) -> Dialled:
    """In a thread: the first host on the route that greets."""
    try:
        hops, warning = find_route(plan)
    except PeerError as error:
        return Dialled(None, str(error))
    problem = ""
    for hop, sock in connect_each(hops, plan.mine):
        if isinstance(sock, OSError):
            where = hop if hop.host != hop.address else Endpoint(hop.address, hop.port)
            problem = problem or "connect to %s: %s" % (str(where), sock.strerror or sock)
            continue
        client, why = greet(plan, hop, sock, plan.cfg.tls)
        if client is not None:
            return Dialled(client, "", tuple(hops), warning or why)
        problem = problem or why
    return Dialled(None, problem, tuple(hops), warning)


def greet(plan: Plan, hop: Hop, sock: socket.socket, policy: str,
          early: bytes = b"") -> Tuple[Optional[Dialer], str]:
    """In a thread: a client that may send mail, and what is odd about it; or the reason why not."""
    login = plan.login
    if login is not None and policy in ("none", "may"):
        policy = "require"              # no password goes in the clear
    client = Dialer(plan.hostname, hop, sock)
    try:
        client.open(policy, login and (login[0], read_secret(login[1])), early)
        return client, ""
    except (PeerError, OSError, ValueError) as error:
        client.close()
        if isinstance(error, TlsError) and policy == "may":
            for _, again in connect_each([hop], plan.mine):
                if not isinstance(again, OSError):
                    anew, why = greet(plan, hop, again, "none")
                    return anew, why or "%s; mail goes in the clear" % error
        if isinstance(error, PeerError):
            return None, str(error)
        why = printable(getattr(error, "strerror", "") or str(error))
        return None, "lost connection with %s: %s" % (hop.host, why)


# -- connections, in the loop

class Rest(NamedTuple):
    """Of a large body: what follows the last command of its group, block by block."""
    id: str
    offset: int
    size: int
    is_stuffed: bool                    # dots are doubled, and the end is sent


class CommandGroup(NamedTuple):
    """RFC 2920.  Each command has one reply."""
    commands: List[bytes]
    seconds: float = COMMAND_S          # for each reply
    is_last: bool = False               # the next exchange may follow behind it
    rest: Optional[Rest] = None


Exchange = Generator[CommandGroup, List[Said], None]
ExchangeForReply = Generator[CommandGroup, List[Said], Said]


class Course:
    """An exchange on its way over a connection."""
    __slots__ = ("exchange", "group", "said", "replies")

    def __init__(self, exchange: Exchange) -> None:
        self.exchange, self.group = exchange, next(exchange)
        self.said = 0                   # commands of the group
        self.replies: List[Said] = []   # to them

    @property
    def is_said(self) -> bool:
        return self.said == len(self.group.commands)

    @property
    def has_body(self) -> bool:
        """Its end of data may have reached the peer."""
        return self.is_said and (self.group.is_last or self.group.rest is not None)

    def seconds(self) -> float:
        """That the next reply may take."""
        command = self.group.commands[len(self.replies)]
        if command == b"DATA\r\n":
            return DATA_S
        return END_OF_DATA_S if command[:5] == b"BDAT " else self.group.seconds

    def go_on(self) -> bool:
        """With the replies to a whole group.  False when all is said and done."""
        replies, self.said, self.replies = self.replies, 0, []
        try:
            self.group = self.exchange.send(replies)
        except StopIteration:
            return False
        return True


class Connection:
    """A greeted connection to a primary.  Exchanges go over it in order, and each reply belongs to the
    first command that has none.  With CHUNKING the next exchange may begin when the one before has sent
    its last group; without, when it is answered."""

    def __init__(self, destination: Destination, client: Dialer, loop: Loop, read_block: Callable[..., None],
                 on_room: Callable[[Connection], None],
                 on_end: Callable[[Connection, str], None]) -> None:
        self.destination, self.hop, self.hostname = destination, client.hop, client.local_hostname
        self.features, self.replies = client.esmtp_features, client.replies
        self.loop, self.read_block, self.on_room, self.on_end = loop, read_block, on_room, on_end
        self.courses: Deque[Course] = collections.deque()
        self.awaited = 0                # replies
        self.taken = self.answered = 0  # messages
        self.left: Deque[Destination] = collections.deque()     # ATRN: whose turn has not come
        self.collects: Tuple[Destination, ...] = ()             # ATRN: all it came for
        self.waits_since = loop.now.mono        # for the next reply, or for something to say
        self.is_late = self.is_leaving = self.is_over = self.is_former = False
        self.is_pulling = self.is_astray = False
        self.introduced: List[str] = []         # the client that the peer was told of last
        self.remark = ""                        # for the log, once
        self.note_features()
        assert client.sock is not None
        self.stream = Stream(loop, client.sock, self._on_data, self._on_stream_end)
        if client.whole or self.replies.pending:
            self._on_lost("%s says what it was not asked for" % str(self.hop))

    def note_features(self) -> None:
        may_pipeline = self.destination.may_pipeline
        self.is_pipelining = may_pipeline and "pipelining" in self.features
        self.is_chunking = may_pipeline and "chunking" in self.features

    def has_room(self) -> bool:
        """No message goes behind a final dot: RFC 2920 3.1 allows it, but Haraka answers 503 to it and
        chasquid loses it.  BDAT may be followed by anything (RFC 3030 2): a window of whole messages
        is, once the peer has taken one; not behind XCLIENT, which comes between messages."""
        if self.is_leaving or self.is_over:
            return False
        if not self.courses:
            return True
        last = self.courses[-1]
        return (self.is_pipelining and self.is_chunking and bool(self.taken) and not self.is_late
                and last.group.is_last and last.is_said and not self.destination.cfg.xclient
                and len(self.courses) < CHUNK_MESSAGES and self.awaited < CHUNK_REPLIES
                and len(self.stream.out) < CHUNK_OCTETS)

    def say(self, exchange: Exchange) -> None:
        with contextlib.suppress(StopIteration):        # it had nothing to say, and has told so
            self.courses.append(Course(exchange))
        self._pump()

    def leave(self) -> None:
        """End in good order after what is under way."""
        self.is_leaving = True
        if not (self.courses or self.is_over):
            self.is_over = True
            self.stream.send(b"QUIT\r\n")
            self.stream.finish()
            self.on_end(self, "")

    def cut(self) -> None:
        self._on_lost("conversation with %s was cut" % self.hop.host)

    def _pump(self) -> None:
        """All that may be said now, in one piece."""
        out: List[bytes] = []
        if self.is_pulling or (self.awaited and not self.is_pipelining):
            return
        for course in self.courses:
            group, end = course.group, None if self.is_pipelining else course.said + 1
            commands = group.commands[course.said:end]
            out += commands
            course.said += len(commands)
            if not course.is_said or not group.is_last or group.rest is not None:
                break
        if not out:
            return
        if not self.awaited:
            self.waits_since = self.loop.now.mono
        self.awaited += len(out)
        self.is_pulling = course.is_said and group.rest is not None
        self.stream.send(b"".join(out))
        if group.rest is not None and self.is_pulling:
            self._pull(group.rest, out[-1][-2:])

    def _pull(self, rest: Rest, held: bytes) -> None:
        """A large body's next block, when the one before is out.  `held`: what came just before it."""
        def on_block(block: Any) -> None:
            if self.is_over:
                return
            if not isinstance(block, bytes) or not block:
                return self._on_lost("%s: the body cannot be read: %s" % (rest.id, block or "it ends early"))
            data = stuff(held, block) if rest.is_stuffed else block
            after = rest._replace(offset=rest.offset + len(block))
            if after.offset >= rest.size:
                self.is_pulling = False
                self.waits_since = self.loop.now.mono
                self.stream.send(data + (b".\r\n" if rest.is_stuffed else b""))
                return self._pump()
            self.stream.on_sent = lambda: self._pull(after, (held + block)[-2:])
            self.stream.send(data)
        self.read_block(on_block, "block", rest.id, rest.offset)

    def _on_data(self, data: bytes) -> None:
        try:
            for code, text in self.replies.feed(data):
                self._on_reply(code, text)
        except PeerError as error:
            return self._on_lost(str(error), error.closing)
        if self.is_over:
            return
        self._pump()
        if self.is_leaving and not self.courses:
            self.leave()
        else:
            self.on_room(self)

    def _on_reply(self, code: int, text: bytes) -> None:
        if self.awaited:
            course = self.courses[0]
            course.replies.append((code, text))
            self.awaited -= 1
            self.is_late, self.waits_since = False, self.loop.now.mono
            if code != 421 and len(course.replies) == len(course.group.commands) and not course.go_on():
                self.courses.popleft()
                if self.is_astray and self.courses:     # whose replies come next is not known
                    raise PeerError(self.remark)
        elif code != 421:
            if self.is_pipelining and self.answered:
                self.destination.may_pipeline = False
            raise unfit("%s says what it was not asked for" % str(self.hop), code, text)
        if code == 421:
            raise unfit(str(self.hop), code, text)

    def _on_stream_end(self, why: str) -> None:
        self._on_lost("lost connection with %s%s" % (self.hop.host, why and ": " + why))

    def _on_lost(self, error: str, closing: bool = False) -> None:
        """The first in line is blamed, unless the peer has had enough of the connection.  Whatever may
        have reached its end of data is in doubt, but not behind a refusal that it hangs up after; the rest
        was not tried."""
        if self.is_over:
            return
        self.is_over = True
        courses, self.courses = self.courses, collections.deque()
        was_refusal = any(code // 100 == 5 for course in courses for code, _ in course.replies[-1:])
        for number, course in enumerate(courses):
            is_blamed = number == 0 and not (closing and self.answered)
            is_in_doubt = course.has_body and not (closing or (number and was_refusal))
            is_news = (is_blamed or is_in_doubt) and not self.is_astray
            problem = PeerError(error if is_news else "", closing)
            problem.replies = course.replies
            with contextlib.suppress(StopIteration):
                course.exchange.throw(problem)
        self.stream.close()
        self.on_end(self, error)

    def sweep(self) -> bool:
        """Once a second: deadlines, and who has nothing to say any more.  True when its answer is late
        since now, which it is until it comes."""
        course = self.courses[0] if self.courses else None
        seconds = course.seconds() if course is not None else IDLE_CONNECTION_S
        if course is None and self.destination.is_ramping:
            seconds = INF               # its turn comes
        if self.silent_s() >= (BLOCK_S if self.is_sending else seconds):
            if course is None:
                self.leave()
            else:
                self._on_overdue(course)
        was, self.is_late = self.is_late, self.is_late or self.is_waiting(LATE_S)
        return self.is_late and not was

    def _on_overdue(self, course: Course) -> None:
        error = "conversation with %s timed out" % self.hop.host
        if self.is_pipelining and not self.is_sending and course.said - len(course.replies) > 1:
            self.destination.may_pipeline = False       # it may lose what is sent ahead
            error += "; no PIPELINING until the next start"
        self._on_lost(error)

    @property
    def is_sending(self) -> bool:
        return self.is_pulling or bool(self.stream.out)

    def silent_s(self) -> float:
        """Seconds since something came, or went out as long as something has to."""
        moved = self.stream.moved if self.is_sending else 0.0
        return self.loop.now.mono - max(self.waits_since, moved)

    def is_waiting(self, seconds: float) -> bool:
        """Whether its answer has not come for so long."""
        return bool(self.courses) and not self.is_over and self.silent_s() > seconds


def stuff(held: bytes, block: bytes) -> bytes:
    """Dots doubled, RFC 5321 4.5.2.  `held`: what comes before the block."""
    return (held + block).replace(b"\r\n.", b"\r\n..")[len(held):]


# -- exchanges

def deliver(connection: Connection, sidecar: Dict[str, Any], people: List[Dict[str, Any]], body: bytes,
            then: Callable[[List[Verdict]], None]) -> Exchange:
    """One transaction.  `then` gets a verdict for each recipient that was answered, or none when it was
    not tried.  Recipients without a verdict go in the next transaction, at once."""
    delivery = Delivery(connection, sidecar, people, body)
    try:
        yield from delivery.run()
    except PeerError as error:
        delivery.on_lost(error)
    then(delivery.verdicts)


class Delivery:
    """What one message was answered: MAIL and RCPT, then the end of its data."""

    def __init__(self, connection: Connection, sidecar: Dict[str, Any], people: List[Dict[str, Any]],
                 body: bytes) -> None:
        self.connection, self.sidecar, self.people, self.body = connection, sidecar, people, body
        self.rest: Optional[Rest] = None                # of the body
        self.verdicts: List[Verdict] = []
        self.accepted: List[Dict[str, Any]] = []        # recipients
        self.replies: List[Said] = []                   # to the envelope

    def run(self) -> Exchange:
        connection, size = self.connection, self.sidecar["size"]
        if connection.destination.cfg.xclient:
            yield from introduce(connection, self.sidecar)
        is_utf8, limit = needs_utf8(self.sidecar, self.body), connection.destination.size_limit
        # What this peer cannot have; its notice will say why in the end.
        if limit and size > limit:
            problem = "message of %d octets exceeds the primary's limit of %d" % (size, limit)
            return self.put_off("5.3.4", problem)
        if is_utf8 and "smtputf8" not in connection.features:
            return self.put_off("5.6.7", "the primary does not offer SMTPUTF8, which this message needs")
        if len(self.body) < size:
            self.rest = Rest(self.sidecar["id"], len(self.body), size, not connection.is_chunking)
        commands = envelope(connection.features, self.sidecar, self.people, is_utf8)
        if connection.is_chunking:
            code, text = yield from self.send_chunk(commands)
            self.sort()
        else:
            code, text = yield from self.send_envelope([*commands, b"DATA\r\n"])
            self.sort()
            code, text = yield from self.send_data(code, text)
        if self.accepted and code in OUT_OF_STEP:
            raise out_of_step(connection, "DATA", code, text)
        self.give(self.accepted, code, text, True)
        connection.answered += bool(self.verdicts)
        connection.taken += any(verdict.kind == "sent" for verdict in self.verdicts)

    def send_chunk(self, commands: List[bytes]) -> ExchangeForReply:
        """RFC 3030.  The RSET shows that the verdict was not some other command's."""
        commands = [*commands, b"BDAT %d LAST\r\n" % self.sidecar["size"] + self.body]
        groups = [CommandGroup(commands + [b"RSET\r\n"], is_last=True)] if self.rest is None else [
            CommandGroup(commands, rest=self.rest), CommandGroup([b"RSET\r\n"], is_last=True)]
        try:
            for group in groups:
                self.replies += yield group
        except PeerError as error:      # it ended behind the verdict: that speaks against no verdict
            self.replies += error.replies
            error.replies = []
            if len(self.replies) < len(commands) or self.replies[len(commands) - 1][0] == 421:
                raise
            self.replies[len(commands):] = [(250, b"")]         # as if RSET had been answered, too
        *self.replies, said, (sync, words) = self.replies
        if sync != 250:
            raise out_of_step(self.connection, "RSET", sync, words)
        return said

    def send_envelope(self, commands: List[bytes]) -> ExchangeForReply:
        """With the question for the data, and its answer.  Without PIPELINING each command waits for the
        reply before it: none is said in vain."""
        is_ahead = self.connection.is_pipelining
        for group in [commands] if is_ahead else [commands[:1], commands[1:-1], commands[-1:]]:
            replies = yield CommandGroup(group)
            self.replies += replies
            if not any(code // 100 == 2 for code, _ in replies):
                break
        if len(self.replies) == len(commands):
            return self.replies.pop()
        return 503, b""                 # DATA was not said: nobody was accepted who could be given this

    def send_data(self, code: int, text: bytes) -> ExchangeForReply:
        """As DATA's answer allows.  Returns the answer that counts."""
        if code == 354 and self.accepted:
            data = stuff(b"\r\n", self.body) + (b".\r\n" if self.rest is None else b"")
            said, = yield CommandGroup([data], END_OF_DATA_S, True, self.rest)
            return said
        if code == 354:                 # to nobody, too, the data must have an end: RFC 2920 3.1
            yield CommandGroup([b".\r\n", b"RSET\r\n"], END_OF_DATA_S, True)
        elif code // 100 == 2 and self.accepted:        # nothing was sent, so nothing can have been taken
            self.connection.is_leaving = True           # the 354 may still come
            return 451, b"4.5.0 unexpected reply to DATA: %d %s" % (code, text)
        else:
            yield CommandGroup([b"RSET\r\n"], is_last=True)
        return code, text

    def sort(self) -> None:
        """What MAIL and RCPT were answered, as far as they were."""
        mail, words = self.replies[0] if self.replies else (421, b"")
        if mail == 421:
            return
        if mail // 100 == 4 and self.connection.taken:
            self.connection.is_leaving = True       # a limit of the connection (OpenSMTPD: 100 messages)
        elif mail in OUT_OF_STEP:
            raise out_of_step(self.connection, "MAIL", mail, words)
        elif mail // 100 != 2:
            self.give(self.people, mail, words)
        put_off = []
        for one, (code, text) in zip(self.people, self.replies[1:] if mail // 100 == 2 else []):
            if code in OUT_OF_STEP:
                raise out_of_step(self.connection, "RCPT", code, text)
            if code == 552 and reply_status(code, text) in ("5.0.0", "5.5.3"):      # RFC 5321 4.5.3.1.10
                code, text = 452, b"4.5.3 too many recipients: 552 " + text
            if code // 100 == 2:
                self.accepted.append(one)
            elif code in (451, 452):
                put_off.append((one, code, text))
            elif code != 421:
                self.give([one], code, text, False if is_no_such_user(code, text) else None)
        for one, code, text in put_off if not self.accepted else ():    # else a limit of the transaction
            self.give([one], code, text)

    def give(self, people: Iterable[Dict[str, Any]], code: int, text: bytes,
             is_good: Optional[bool] = None) -> None:
        kind, status = {2: "sent", 5: "refused"}.get(code // 100, "deferred"), reply_status(code, text)
        status = "4.5.0" if status[0] == "3" else status
        host, is_told = self.connection.hop.host, "dsn" in self.connection.features
        words = reply_text(code, text)
        self.verdicts += [Verdict(one["address"], kind, status, words, host, is_good, is_told)
                          for one in people]

    def put_off(self, status: str, problem: str) -> None:
        self.verdicts = [Verdict(one["address"], "deferred", status, problem, "") for one in self.people]

    def on_lost(self, error: PeerError) -> None:
        """What it said before it hung up stays said."""
        if not (self.verdicts or self.accepted):
            self.replies += error.replies
            with contextlib.suppress(PeerError):
                self.sort()
        if self.connection.is_astray:
            self.verdicts.clear()       # whose they were is not known
        self.connection.answered += any(verdict.remote for verdict in self.verdicts)
        known = {verdict.address for verdict in self.verdicts}
        self.verdicts += [
            Verdict(one["address"], "deferred", "4.4.2", str(error), "", one in self.accepted or None)
            for one in self.people if one["address"] not in known and str(error)]


def out_of_step(connection: Connection, command: str, code: int, text: bytes) -> PeerError:
    """No word about a message.  Messages go again one by one, without window and PIPELINING; where that
    is so already, the peer is odd, and the message is put off."""
    was_ahead = connection.is_pipelining or connection.is_chunking
    connection.destination.may_pipeline = False
    error = "%s answers %s with %s" % (connection.hop, command, reply_text(code, text))
    connection.remark = error + ("; no PIPELINING until the next start" if was_ahead else "")
    connection.is_leaving = connection.is_astray = True
    return PeerError("" if was_ahead else error)


def needs_utf8(sidecar: Mapping[str, Any], body: bytes) -> bool:
    """SMTPUTF8 was said, and its envelope or header has an octet beyond ASCII, RFC 6531 3.4."""
    if not sidecar["smtputf8"]:
        return False
    addresses = [sidecar["sender"], *(one["address"] for one in sidecar["recipients"])]
    return not (all(map(str.isascii, addresses)) and body.partition(b"\r\n\r\n")[0].isascii())


def envelope(features: Mapping[str, str], sidecar: Mapping[str, Any], people: Sequence[Mapping[str, Any]],
             is_utf8: bool) -> List[bytes]:
    """MAIL and RCPT.  Addresses went through our grammar twice."""
    has_dsn = "dsn" in features
    mail = ["MAIL FROM:<%s>" % sidecar["sender"]]
    mail += ["SIZE=%d" % sidecar["size"]] * ("size" in features)
    mail += ["BODY=8BITMIME"] * (sidecar["body"] == "8BITMIME" and "8bitmime" in features)
    mail += ["SMTPUTF8"] * is_utf8
    mail += ["%s=%s" % (key.upper(), sidecar[key]) for key in ("ret", "envid") if has_dsn and sidecar[key]]
    rcpts = [["RCPT TO:<%s>" % one["address"]]
             + ["%s=%s" % (key.upper(), one[key]) for key in ("notify", "orcpt") if has_dsn and one[key]]
             for one in people]
    return [" ".join(words).encode("utf-8") + b"\r\n" for words in [mail, *rcpts]]


def introduce(connection: Connection, sidecar: Mapping[str, Any]) -> Exchange:
    """XCLIENT, else XFORWARD: who the original client was, for the primary's checks.  A primary that
    does not trust us with it is no reason to wait."""
    verb = next((one for one in ("xclient", "xforward") if connection.features.get(one)), "")
    known = origin_of(connection, sidecar)
    words = ["%s=%s" % (name, known[name]) for name in connection.features.get(verb, "").upper().split()
             if name in known]
    if not words or (verb == "xclient" and words == connection.introduced):
        return                          # XCLIENT holds until another; XFORWARD for one transaction
    connection.introduced = words
    (code, text), = yield CommandGroup([("%s %s\r\n" % (verb.upper(), " ".join(words))).encode("ascii")])
    if code // 100 != 2:
        connection.remark = "%s refuses %s: %s" % (connection.hop, verb.upper(), reply_text(code, text))
        del connection.features[verb]   # not again over this connection
    elif verb == "xclient" and code == 220:     # the session begins anew, with the client's name
        helo = decode_xtext(known["HELO"])
        helo = helo if re.fullmatch(r"[!-~]+", helo) and helo[0] != "[" else "[%s]" % known["ADDR"]
        (code, text), = yield CommandGroup([("EHLO %s\r\n" % helo).encode("ascii")])
        if code // 100 == 2:
            lines = [line.split() for line in text.decode("latin-1").split("\n")[1:] if line.strip()]
            connection.features = {name.lower(): " ".join(values) for name, *values in lines}
            connection.note_features()


def origin_of(connection: Connection, sidecar: Mapping[str, Any]) -> Dict[str, str]:
    """Attributes as xtext.  Mail of our own comes from ourselves, also where somebody else was
    introduced before."""
    client = sidecar["client"]
    address, helo, name = client["address"], client["helo"], client.get("name") or "[UNAVAILABLE]"
    if not address:
        address, helo = connection.stream.sock.getsockname()[0], connection.hostname
        name = connection.hostname
    address = address.partition("%")[0]
    return {"NAME": "[UNAVAILABLE]" if name == "unknown" else name,
            "ADDR": "IPV6:" + address if ":" in address else address, "PORT": "[UNAVAILABLE]",
            "HELO": encode_xtext(helo, XCLIENT_VALUE_MAX) or "[UNAVAILABLE]", "PROTO": "ESMTP",
            "IDENT": sidecar["id"], "SOURCE": "REMOTE"}


def verify(connection: Connection, address: str, then: Callable[[str, str], None]) -> Exchange:
    """Call-ahead: would the primary take this recipient?  `then` gets good, bad or silent and the
    reply; only RCPT's own answer behind an accepted MAIL counts.  "lost" when the connection ended
    before."""
    if not (address.isascii() or "smtputf8" in connection.features):
        return then("silent", "")
    mail = b"MAIL FROM:<>" + (b"" if address.isascii() else b" SMTPUTF8") + b"\r\n"
    rcpt = b"RCPT TO:<%s>\r\n" % address.encode("utf-8")
    try:
        replies = yield CommandGroup([mail, rcpt, b"RSET\r\n"], is_last=True)
    except PeerError as error:          # what it said before it hung up stays said
        replies = error.replies
        if len(replies) < 2 or 421 in (replies[0][0], replies[1][0]):
            return then("lost", "")
    (code, text), answer, *_ = replies
    word = "silent"
    if code // 100 == 2:
        code, text = answer
        word = "good" if code // 100 == 2 else "bad" if is_no_such_user(code, text) else "silent"
    connection.answered += 1
    then(word, reply_text(code, text))


# == 13. QUEUE =================================================================
# What becomes of queued mail.  Runs in the loop and never waits: disk work is asked
# of the spool, dialling of threads, and their answers come back here.  Uses all before.
#   Queue       owns the messages from their 250 to their end: age, cut-through, commands
#   Loader      reads the spool at the start and at SIGHUP
#   Deliveries  owns the connections to primaries: how many there are, what each is given
#   judge()     what a primary's answers mean, also when it answers 550 to all
#   Recorder    what is written down, what senders are told, and what a full disk does
#   Alerts      who is told
# Who made an entry SENDING has it alone, and gives it back, puts it off or lets it leave.
# Nobody else ends it meanwhile, whatever an operator orders.
# What waits in between is a generator of steps, and Queue.run() goes on with it.

Sidecar = Dict[str, Any]
People = Mapping[str, Mapping[str, Any]]        # address: what changes of a recipient in the sidecar
Steps = Generator[Any, Any, Any]        # yields what it asks of the spool, seconds, or work for a thread
Decision = Callable[[Optional[Reply]], None]    # gets a refusal, or None for "the message is ours"


class Watch:
    """A command that waits: done when each of its messages has left or failed once."""

    def __init__(self, ids: Iterable[str]) -> None:
        self.left = set(ids)
        self.total = len(self.left)
        self.counts = dict.fromkeys(("delivered", "bounced", "expired", "deferred", "deleted"), 0)
        self.error = ""                 # why a message failed

    def note(self, id: str, kind: str, error: str = "") -> None:
        if id in self.left:
            self.left.discard(id)
            self.counts[kind] += 1
            self.error = error or self.error


class Queue:
    """The messages, from their 250 to their end."""

    def __init__(self, cfg: Config, spool: SpoolProcess, loop: Loop, log: Log) -> None:
        self.cfg, self.spool, self.loop, self.log = cfg, spool, loop, log
        self.destinations, self.recipients = Destinations(cfg), RecipientCache()
        self.loader, self.deliveries = Loader(self), Deliveries(self)
        self.recorder, self.alerts = Recorder(self), Alerts(self)
        self.listeners: Endpoints = ()
        self.watches: List[Watch] = []
        self.waiters: Dict[str, Tuple[Destination, Decision]] = {}    # by ID: clients in cut-through
        self.fresh: Dict[str, Tuple[str, ...]] = {}     # by ID: recipients not yet logged as deferred
        self.left: Dict[str, Tuple[str, str, Time]] = {}        # by ID: destination, what became of it, when
        self.hosts: Dict[str, FrozenSet[str]] = {}      # by destination: addresses, as last routed
        self.corrupt = 0                # messages in corrupt/
        self.last_id = 0
        self.is_stopping = self.is_dirty = False
        self.only = "all"               # what may be delivered; in a command's own run less, or nothing
        self.drift = loop.now.wall - loop.now.mono

    @property
    def now(self) -> Now:
        return self.loop.now

    def new_id(self) -> str:
        """The time in microseconds, never the same twice, in upper-case hex: a spool sorts by age."""
        self.last_id = max(self.last_id + 1, time.time_ns() // 1000)
        return "%X" % self.last_id

    def run(self, steps: Steps, result: Any = None) -> None:
        """Go on with them, with the result of the last one."""
        try:
            wish = steps.send(result)
        except StopIteration:
            return
        go_on = functools.partial(self.run, steps)
        if isinstance(wish, tuple):
            self.spool.ask(go_on, *wish)
        elif isinstance(wish, float):
            self.loop.later(wish, go_on)
        else:
            self.loop.in_thread(wish, go_on)

    def _know_domains(self) -> None:
        """Those that have a section of their own, whether mail came for them yet or not."""
        for name in self.cfg.domains:
            if name[0] != ".":
                self.destinations.get(name, self.now)

    # -- a message comes

    def admit(self, found: Summary, is_ours: bool = False) -> Destination:
        """An entry, unless it is there already."""
        one = self.destinations.get(self.destinations.name_for(found.kind, found.domain), self.now)
        if found.is_finished:           # a crash came before its removal
            self.run(self.recorder.ask("remove", found.id))
        elif found.id not in one.entries:
            entry = Entry(found.id, found.size, found.received, found.attempts, found.is_held,
                          found.is_delay_told, is_ours)
            one.add(entry, self.now, found.next_attempt - self.now.wall)
            self.deliveries.attend(one)
        return one

    def accept(self, sidecar: Sidecar, size: int, answer: Optional[Decision] = None) -> None:
        """A message that is on stable storage now.  `answer`: its client waits, if that is worth it, for the
        primary's verdict (cut-through).  It gets the refusal of all recipients, and then the message is
        gone, or None: the message was taken, or stays queued."""
        self._look_at_clock()           # before the next sweep: a jump is about the mail before this one
        id, jump = sidecar["id"], self.now.wall - sidecar["received"]
        if abs(jump) > CLOCK_JUMP_S:    # ... and this one came before it, and was at the disk
            shift_times(sidecar, jump)
            self.spool.ask(self.log_failure, "shift", [id], jump)
        one = self.admit(summarize(dict(sidecar, size=size)), True)
        self.is_dirty = True
        self.fresh[id] = tuple(person["address"] for person in sidecar["recipients"])
        self.log.write("qmgr", "%s: from=<%s>, size=%d, nrcpt=%d (queue active)" % (
            id, printable(sidecar["sender"]), size, len(sidecar["recipients"])))
        if one.waits_for and not one.is_collecting:
            self.log_waiting(one, one.waits_for)
        self.waiters[id] = one, answer or (lambda refusal: None)
        if answer and one.may_cut_through(self.now) and not (self.is_stopping or self.recorder.is_behind):
            one.urge(one.entries[id])
            self.loop.later(CUT_THROUGH_S, lambda: self.let_go(id))
        else:
            self.let_go(id)

    def let_go(self, id: str) -> None:
        """The client waits no longer: the message is ours."""
        if id in self.waiters:
            one, answer = self.waiters.pop(id)
            one.counters["accepted"] += 1
            answer(None)

    def hand_back(self, one: Destination, entry: Entry, verdict: Verdict) -> Steps:
        """The client gets the refusal once the message has left the spool."""
        code, _, text = verdict.response.partition(" ")
        text = text[len(verdict.status):].lstrip(" ") if text.startswith(verdict.status) else text
        text = text.encode("ascii", "backslashreplace").decode("ascii")         # RFC 6531 3.7.4
        _, answer = self.waiters.pop(entry.id)
        result = yield from self.recorder.ask("remove", entry.id, must=False)
        if isinstance(result, Exception):       # it stays, and may come twice
            answer(disk_reply(result if isinstance(result, OSError) else None))
            return self.put_off(one, entry, RETRY_DISK_S, str(result))
        self.leave(one, entry, "bounced")
        answer(Reply(int(code), verdict.status, text))

    def own_sidecar(self, id: str, kind: str, target: str, data: bytes) -> Sidecar:
        """Of mail of our own, from the null reverse-path."""
        domain = parse_path("<%s>" % target, "5.1.3")[0].domain
        expires = self.now.wall + self.destinations.config_of(NOTICES).lifetime
        return make_sidecar(id, kind, domain, "", [(target, "", "")], self.now.wall, expires,
                            {"address": "", "helo": "", "tls": None},
                            "" if data.isascii() else "8BITMIME", not target.isascii())

    # -- a message stays, or goes

    def put_off(self, one: Destination, entry: Entry, pause: float, error: str) -> None:
        one.put_off(entry, self.now, pause)
        self.note(entry.id, "deferred", error)
        self.deliveries.attend(one)

    def leave(self, one: Destination, entry: Entry, kind: str) -> None:
        """It has left the spool."""
        one.drop(entry.id)
        self.fresh.pop(entry.id, None)
        self.left[entry.id] = one.name, kind, self.now.wall
        if len(self.left) > LEFT_KEPT:
            del self.left[next(iter(self.left))]
        self.note(entry.id, kind)
        self.let_go(entry.id)

    def note(self, id: str, kind: str, error: str = "") -> None:
        for watch in self.watches:
            watch.note(id, kind, error)

    def on_fault(self, one: Destination, entry: Entry, fault: Exception) -> None:
        """A message could not be read."""
        if isinstance(fault, Corrupt):
            self.leave(one, entry, "deleted")
            self.set_aside(entry.id, fault)
        else:
            self.log.write("qmgr", "%s: cannot be read: %s" % (entry.id, printable(str(fault))), "error")
            self.put_off(one, entry, RETRY_DISK_S, str(fault))

    def set_aside(self, id: str, why: Any) -> None:
        """To corrupt/, until that has worked."""
        def moved(remark: Any) -> None:
            if isinstance(remark, Exception):
                remark = "%s: corrupt: %s; and cannot be moved: %s" % (id, why, remark)
                self.loop.later(RETRY_DISK_S, lambda: self.set_aside(id, why))
            else:
                self.corrupt += not isinstance(why, Gone)
            self.log.write("qmgr", remark, "warning")
        self.spool.ask(moved, "set_aside", id, why)

    def log_delivery(self, entry: Entry, verdict: Verdict, relay: str = "none", seconds: float = 0.0) -> None:
        delay = max(0.0, self.now.wall - entry.received)
        self.log.write("smtp", "%s: to=<%s>, relay=%s, delay=%s, delays=0/%s/0/%s, dsn=%s, status=%s (%s)" % (
            entry.id, printable(verdict.address), relay, format_delay(delay),
            format_delay(max(0.0, delay - seconds)), format_delay(seconds), verdict.status, verdict.kind,
            printable(verdict.response)))

    def log_waiting(self, one: Destination, error: str) -> None:
        """Each message says once in the log that it waits, not at every probe."""
        for id in [id for id in self.fresh if id in one.entries]:
            entry, addresses = one.entries[id], self.fresh.pop(id)
            if entry.state is not State.SENDING:
                one.counters["deferred"] += 1
                for address in addresses:
                    self.log_delivery(entry, Verdict(address, "deferred", "4.4.1", error, ""))

    def log_failure(self, result: Any) -> None:
        if isinstance(result, Exception):
            self.log.write("qmgr", "cannot be recorded: %s" % printable(str(result)), "error")

    # -- primaries: their states, and the addresses they have

    def tell(self, one: Destination, change: Optional[Change]) -> None:
        """The only place that says, saves and alerts that a primary's state has changed."""
        if change is None:
            return
        event, lasted = change.now.value, format_duration(change.lasted)
        text = "%s: %s" % (event, one.last_error)
        if change.now is Primary.UP:
            text = {Primary.DOWN: "up after " + lasted,
                    Primary.REJECTING: "up after rejecting for " + lasted}.get(change.was, "up")
        elif change.now is Primary.REJECTING:
            since = self.now.to_wall(one.recovered) if one.recovered > -INF else 0.0
            self.recipients.forget_bad(one.name, since)
            self.deliveries.on_rejecting(one)
        text = "%s, %d messages waiting" % (text, len(one.entries))
        self.log.write("primary", "%s: %s" % (one.label, printable(text)),
                       "warning" if change.now is Primary.REJECTING else "info")
        self.is_dirty = True
        if not one.cfg.is_notices:      # of those there may be thousands, one for each domain that spam names
            self.save_state()
            self.alerts.on_state(one, event, text)

    def note_hosts(self, one: Destination, hosts: Iterable[Hop]) -> None:
        if not one.cfg.is_notices:
            self.hosts[one.name] = frozenset(hop.address for hop in hosts)

    def on_client(self, address: str) -> None:
        """Somebody connected.  A primary that does so is back."""
        for name in [name for name, hosts in self.hosts.items() if address in hosts]:
            one = self.destinations.all.get(name)
            if one is not None and one.entries and (one.state is not Primary.UP or one.late):
                one.trigger(self.now)
                self.deliveries.urge(one)

    def may_know(self, address: str, meant: Iterable[Destination]) -> bool:
        """Whether a client may be told how much waits: one of ours, or the primary itself."""
        return self.cfg.is_trusted(address) or all(address in self.hosts.get(one.name, ()) for one in meant)

    # -- ends by age and by command

    def sweep(self) -> None:
        """Once a second: clocks, ages, deadlines, destinations that nobody needs any more."""
        self._look_at_clock()
        self.deliveries.sweep()
        for one in list(self.destinations.all.values()):
            expired, delayed = one.look(self.now)
            for entry in expired:
                error = UNCOLLECTED if one.waits_for else one.obstacle
                self.run(self.end(one, entry, "expired", "4.4.7", error))
            for entry in delayed:
                self.run(self._tell_delay(one, entry))
            is_needed = one.entries or one.is_held or one.is_collecting or one.name in self.cfg.domains
            if not is_needed and self.deliveries.forget(one):
                del self.destinations.all[one.name]     # of a notice, or a subdomain somebody wrote to once
                self.hosts.pop(one.name, None)

    def end(self, one: Destination, entry: Entry, kind: str, status: str = "", error: str = "") -> Steps:
        """Expired, bounced or deleted; record() makes the notice of the first two.  A message whose last
        answer names a fault of its own (5.3.4, 5.6.7) expires with that, not as a timeout."""
        one.take_out(entry)
        if kind == "deleted":
            yield from self.recorder.ask("remove", entry.id)
            return self.leave(one, entry, kind)
        found = yield "look", entry.id
        if isinstance(found, Exception):
            return self.on_fault(one, entry, found)
        people, judged = self._refresh(one, entry, found[0]), []
        for address, person in people.items():
            person["state"] = EXPIRED if kind == "expired" else BOUNCED
            if kind != "expired" or person["last_status"][:1] != "5":
                person["last_status"] = status
                if error:
                    person.update(last_response=error, last_remote="")
            judged.append(Verdict(address, kind, person["last_status"], person["last_response"],
                                  person["last_remote"]))
            self.log_delivery(entry, judged[-1])
        done = yield from self.recorder.record(entry.id, found[0], judged, people)
        if isinstance(done, Exception):
            return self.on_fault(one, entry, done)
        one.counters[kind] += 1
        self.leave(one, entry, kind)

    def _tell_delay(self, one: Destination, entry: Entry) -> Steps:
        """Tell the sender, once, that a message waits."""
        entry.is_delay_told = True
        found = yield "look", entry.id
        if isinstance(found, Exception):
            if isinstance(found, OSError):
                entry.is_delay_told, one.next_look = False, self.now.mono + RETRY_DISK_S
            return
        told = [Verdict(person["address"], "delayed", person["last_status"] or "4.4.1",
                        person["last_response"], person["last_remote"])
                for person in self._refresh(one, entry, found[0]).values() if not person.get("delayed")]
        people = {verdict.address: {"delayed": True} for verdict in told}
        yield from self.recorder.record(entry.id, found[0], told, people)

    def keep_attempts(self) -> None:
        """At the end of a run.  Of mail past its lifetime failed connections are written down, so that
        a --flush from cron, too, has tried it often enough one day."""
        def keep(one: Destination, entry: Entry) -> Steps:
            found = yield "look", entry.id
            if not isinstance(found, Exception):
                people = self._refresh(one, entry, found[0])
                yield from self.recorder.record(entry.id, found[0], [], people, False)
        for one in self.destinations.all.values():
            for entry in one.entries.values() if one.failures else ():
                if entry.deadline <= self.now.mono and entry.state in (State.READY, State.LATER):
                    self.run(keep(one, entry))

    def _refresh(self, one: Destination, entry: Entry, sidecar: Sidecar) -> Dict[str, Dict[str, Any]]:
        """The queued recipients, by address, with the failed connections, which are counted in memory
        alone.  What the primary said of the message itself stays said."""
        new, error = one.failed_since(entry), one.obstacle
        people = {person["address"]: person for person in sidecar["recipients"] if person["state"] == QUEUED}
        for person in people.values():
            person["expires"] = max(0.0, self.now.to_wall(entry.deadline))
            if error and (new or not person["last_response"]) and person["last_status"][:1] != "5":
                person.update(last_status="4.4.1", last_response=error, last_remote="")
            if new:
                person.update(attempts=person["attempts"] + new,
                              last_attempt=self.now.to_wall(one.last_try))
        return people

    def _look_at_clock(self) -> None:
        drift = self.now.wall - self.now.mono
        jump, self.drift = drift - self.drift, drift
        if abs(jump) > CLOCK_JUMP_S:
            self.log.write("master", "the clock jumped by %d s: mail accepted since the start keeps its age, "
                           "and nothing expires before it was tried again" % jump, "warning")
            for one in self.destinations.all.values():
                ids = one.on_clock_jump(self.now, jump)
                for at in range(0, len(ids), END_BATCH):
                    self.spool.ask(self.log_failure, "shift", ids[at:at + END_BATCH], jump)

    # -- commands

    def flush(self, meant: Iterable[Destination]) -> bool:
        """ETRN, --flush and SIGUSR1 meet here.  False when a flush was under way already."""
        meant = [one for one in meant if not one.is_held]
        fresh = [one.flush(self.now) for one in meant]
        for one in meant:
            self.deliveries.urge(one)
        return all(fresh)

    def probe_all(self) -> None:
        """SIGUSR1: every primary is asked, whether mail waits for it or not."""
        meant = self.destinations.matching("all")
        for one in meant:
            if not (one.entries or one.waits_for or one.cfg.is_notices):
                one.trigger(self.now)
                self.deliveries.ask(one, "", lambda word, text: None)
        self.flush(meant)

    def pardon(self, meant: Iterable[Destination]) -> None:
        """--flush: the operator says that rejecting primaries are themselves again."""
        for one in meant:
            self.tell(one, one.on(Event.PARDONED, self.now))

    def move(self, what: str, address: str) -> None:
        """An authenticated ETRN: where `primary = etrn`, the primary is where it came from."""
        for cfg in self.destinations.meant(what):
            if cfg.primary == "etrn" and self.destinations.homes.get(cfg.name) != address:
                moved = self.destinations.move(cfg, address, self.now)
                self.log.write("primary", "%s: at %s since an authenticated ETRN" % (cfg.name, address))
                self.deliveries.part(moved, PART_S)
                self.save_state()

    def hold(self, what: str, on: bool, done: Callable[[Any], None]) -> int:
        """An ID, a domain (later mail for it, too), or all.  Returns the number of messages meant;
        `done` is called when it is on stable storage."""
        if what[0] != "@" and self.cfg.domain(what) is not None:
            self.destinations.get(what, self.now)       # a subdomain that no mail has come for yet
        meant = self.destinations.matching(what)
        for one in meant:
            self.deliveries.give_back_fetched(one)
            one.watched_since = one.watched_since if on else self.now.mono
        if meant and what in meant[0].entries:
            meant[0].hold(meant[0].entries[what], on)
            self.spool.ask(done, "record", what, {"held": on}, {})
            self.deliveries.attend(meant[0])
            return 1
        for one in meant:
            for entry in one.hold_all(on):
                self.spool.ask(self.log_failure, "record", entry.id, {"held": False}, {})
            self.deliveries.attend(one)
        self.save_state(done)
        return sum(len(one.entries) for one in meant)

    def reconfigure(self, cfg: Config) -> None:
        """SIGHUP."""
        self.cfg = cfg
        changed = self.destinations.reconfigure(cfg, self.now)
        self._know_domains()
        for one in changed:
            self.recipients.forget_bad(one.name)        # another primary has other recipients
            self.recipients.accept_all.pop(one.name, None)
        self.deliveries.part(changed, END_OF_DATA_S)
        for one in list(self.destinations.all.values()):
            self.deliveries.attend(one)

    def stop(self) -> None:
        """No new connections; those open end after the message they are at."""
        self._look_at_clock()           # it may have been set since the last sweep
        self.is_stopping = True
        for connection in self.deliveries.all():
            connection.leave()
        for id in list(self.waiters):
            self.let_go(id)

    # -- state.json and recipients.json: what was learnt, over a restart

    def save_state(self, then: Callable[[Any], None] = lambda result: None) -> None:
        """`then` is called when state.json is on stable storage, or cannot be."""
        sites = {one.name: dict(one.to_values(self.now), told=one.name in self.alerts.told)
                 for one in self.destinations.all.values()}
        state = {"format": 1, "saved": self.now.wall, "sites": sites, "homes": dict(self.destinations.homes)}
        self.is_dirty = False
        if self.recipients.is_dirty:
            self.run(self._save("recipients.json", self.recipients.to_values(self.now.wall)))
        self.run(self._save("state.json", state, then))

    def _save(self, name: str, values: Any, then: Callable[[Any], None] = lambda result: None) -> Steps:
        result = yield "save", name, values
        self.log_failure(result)
        if isinstance(result, Exception):
            self.is_dirty = self.recipients.is_dirty = True     # again with the next save
        then(result)

    def load_state(self, state: Mapping[str, Any], recipients: Mapping[str, Any]) -> None:
        """What was known before the restart.  What does not make sense is forgotten."""
        self.recipients.from_values(recipients)
        homes, sites = state.get("homes"), state.get("sites")
        for name, address in homes.items() if isinstance(homes, dict) else ():
            cfg = self.cfg.domains.get(name)
            if cfg is not None and cfg.primary == "etrn" and is_address(address):
                self.destinations.homes[name] = address
        self._know_domains()
        for name, values in sites.items() if isinstance(sites, dict) else ():
            with contextlib.suppress(TypeError, ValueError, KeyError, AttributeError, OverflowError):
                # A hold is an operator's order.  It stands even where the rest makes no sense.
                is_held = values["held"] is True
                if not is_held and self.cfg.domain(name) is None:
                    continue
                one = self.destinations.get(name, self.now)
                one.is_held = is_held
                one.from_values(values, self.now)       # raises where it was written by hand, say
                self.note_hosts(one, one.route)
                if one.state is Primary.DOWN and values.get("told") is True:
                    self.alerts.told[name] = "down"


class Loader:
    """Reads the spool into the queue; mail is accepted meanwhile."""

    def __init__(self, queue: Queue) -> None:
        self.queue, self.spool, self.log = queue, queue.spool, queue.log
        self.early: Set[str] = set()    # flushes asked for while it was being read
        self.is_busy = False
        self.loads = 0
        self.error = ""                 # why it cannot be listed
        self.trouble = ""               # why something in it cannot be read
        self.again = INF                # seconds from the end of this time to the next
        self.pause = RETRY_DISK_S       # ... after trouble

    def load(self, ids: Optional[List[str]] = None) -> None:
        """All of it, or some messages.  Again at SIGHUP, for pairs that were copied in."""
        if self.is_busy:
            self.again = 0.0            # what was copied since may be behind the reader
        else:
            self.is_busy, self.again, self.trouble = True, INF, ""
            self.queue.run(self._load(ids))

    def _load(self, ids: Optional[List[str]]) -> Steps:
        found = (yield ("list",)) if ids is None else (ids, [])
        self.error = self.trouble = printable(str(found)) if isinstance(found, Exception) else ""
        ids, alone = ([], []) if self.error else found
        known = {id for one in self.queue.destinations.all.values() for id in one.entries}
        unread = [id for id in ids if id not in known]
        self.loads += not self.error
        for id in alone:
            self.queue.set_aside(id, "a body without a sidecar")
        for at in range(0, len(unread), LOAD_BATCH):
            batch = unread[at:at + LOAD_BATCH]
            results = yield "load", batch, self.loads > 1
            if isinstance(results, Exception):
                results = [results] * len(batch)
            for id, result in zip(batch, results):
                yield from self._take(id, result)
        self.is_busy = False
        if self.trouble:
            self.log.write("qmgr", "the spool could not be read whole: %s; trying again in %s" % (
                self.trouble, format_duration(self.pause)), "error")
            self.again, self.pause = min(self.again, self.pause), min(2.0 * self.pause, RETRY_READ_S)
        else:
            self.pause = RETRY_DISK_S
        if self.again < INF:
            self.queue.loop.later(self.again, self.load)
        while self.early:
            self.queue.flush(self.queue.destinations.matching(self.early.pop()))

    def _take(self, id: str, found: Any) -> Steps:
        if isinstance(found, list) and len(found) > 1 and self.spool.may_write:
            found = yield "convert", id         # of version 0.1, about several domains: split durably first
        if isinstance(found, list):
            for part in found:
                self.queue.admit(part)
        elif isinstance(found, BlockingIOError):
            self.again = min(self.again, COPY_S)        # it may still be being copied in
        elif isinstance(found, NotOurs):
            self.log.write("qmgr", "%s: left alone: %s" % (id, found), "warning")
        elif not isinstance(found, Corrupt):
            self.trouble = "%s: %s" % (id, printable(str(found)))
        elif not isinstance(found, Gone):
            self.queue.set_aside(id, found)


STRANGER = "?"                          # keys the question whether a primary takes any address


class Question(NamedTuple):
    """Whether the primary takes this recipient; empty: whether it is there at all."""
    key: Tuple[str, str]                # destination, and recipient or STRANGER
    address: str
    waiting: List[Callable[[str, str], None]]           # sessions that ask the same share it
    is_again: bool = False              # the connection that had it was lost


class Traffic:
    """What is under way towards one destination."""
    __slots__ = ("connections", "former", "fetched", "is_fetching", "questions", "dials", "alarm")

    def __init__(self) -> None:
        self.connections: List[Connection] = []
        self.former: List[Connection] = []      # to the primary that it had before: they end what they are at
        self.fetched: Deque[Tuple[Entry, Sidecar, bytes]] = collections.deque()     # read, not yet sent
        self.is_fetching = False
        self.questions: Deque[Question] = collections.deque()       # not yet asked
        self.dials: List[Dial] = []
        self.alarm = INF                # monotonic, of the last timer set


class Deliveries:
    """Connections: when to dial, what each is given, what the end of one says of the primary.

    How many there are after an outage: one, which sends the canary.  The others, up to `connections`
    and as far as mail waits, are dialled meanwhile, as Destination.wanted() says, and wait.  When the
    canary is taken 2 may send, then 4, 8 and so on: _may_send()."""

    def __init__(self, queue: Queue) -> None:
        self.queue, self.loop, self.spool, self.log = queue, queue.loop, queue.spool, queue.log
        self.traffic: Dict[str, Traffic] = collections.defaultdict(Traffic)
        self.dialling = 0               # all told, each a thread
        self.starved: Dict[str, None] = {}      # who could not dial because too many did, in that order
        self.asked: Dict[Tuple[str, str], Question] = {}
        self.arriving: Dict[Dial, Sequence[Destination]] = {}       # turned around, but has not greeted yet

    def of(self, one: Destination) -> Traffic:
        return self.traffic[one.name]

    def all(self) -> List[Connection]:
        return [connection for traffic in self.traffic.values()
                for connection in (*traffic.connections, *traffic.former)]

    def forget(self, one: Destination) -> bool:
        """A destination without mail.  False while something is under way."""
        traffic = self.of(one)
        if not (traffic.connections or traffic.former or traffic.dials or traffic.questions
                or traffic.is_fetching):
            del self.traffic[one.name]
        return one.name not in self.traffic

    # -- giving out

    def attend(self, one: Destination) -> None:
        """Give its connections what they have room for, dial where one more is wanted, be back in time."""
        known, only = self.queue.destinations, self.queue.only
        if self.queue.is_stopping or (only != "all" and one not in known.matching(only)):
            return
        if known.all.get(one.name) is not one:
            return                      # the destination was removed, and this is its old timer
        now, traffic = self.loop.now, self.of(one)
        active = [connection for connection in traffic.connections
                  if not (connection.is_late or connection.is_leaving or connection.collects)]
        for connection in active[one.most:]:        # they may have been halved
            connection.leave()
        for connection in list(traffic.connections):
            self._feed(connection)
        late = [connection for connection in traffic.connections if connection.is_late]
        answering = len(traffic.connections) - len(late)
        others = len(traffic.questions) + len(traffic.fetched)
        # Where the primary is not up, only what became late after that counts.
        hanging = sum(one.state is Primary.UP or connection.waits_since >= one.since for connection in late)
        while one.wanted(now, answering, hanging, len(traffic.dials), others) and self._may_dial(one):
            self._dial(one, traffic)
            if len(late) > max(LATE_MAX, one.cfg.connections):
                late.pop(0).cut()       # the oldest of those that hang makes room
        at = one.wake(now, others)
        if at is not None and not now.mono < traffic.alarm <= at:       # else a timer comes soon enough
            traffic.alarm = at
            self.loop.later(max(0.0, at - now.mono), functools.partial(self.attend, one))

    def _feed(self, connection: Connection) -> None:
        """Questions first, then messages."""
        one = connection.destination
        traffic, recorder = self.of(one), self.queue.recorder
        self._fetch(one, traffic)
        while connection.has_room():
            if traffic.questions:
                question = traffic.questions.popleft()
                if question.address:
                    connection.say(verify(connection, question.address,
                                          functools.partial(self._on_word, connection, question)))
                else:
                    self._answer(question, "silent", "")        # it has greeted
            elif traffic.fetched and not recorder.is_behind and self._may_send(connection, traffic):
                self._say_message(connection, *traffic.fetched.popleft())
                self._fetch(one, traffic)
            elif not connection.collects or connection.courses or traffic.is_fetching or recorder.is_behind:
                break
            elif connection.left:       # ATRN: the next domain's turn
                traffic.connections.remove(connection)
                connection.destination = connection.left.popleft()
                self.of(connection.destination).connections.append(connection)
                return self._feed(connection)
            else:
                return connection.leave()
        if connection.remark:
            self.log.write("smtp", "%s: %s" % (one.label, connection.remark), "warning")
            connection.remark = ""

    def _may_send(self, connection: Connection, traffic: Traffic) -> bool:
        """Or it was dialled ahead, and waits until the limit is raised."""
        if connection.courses or connection.collects:
            return True
        senders = sum(bool(other.courses) and not other.is_late for other in traffic.connections)
        return senders < connection.destination.limit

    def _say_message(self, connection: Connection, entry: Entry, sidecar: Sidecar, body: bytes) -> None:
        one = connection.destination
        people = [person for person in sidecar["recipients"] if person["state"] == QUEUED]
        due = [person for person in people if person["next_attempt"] <= self.loop.now.wall] or people

        def answered(verdicts: List[Verdict]) -> None:
            if verdicts:
                judge(self.queue, one, connection, entry, sidecar, due, verdicts)
            else:
                one.give_back(entry)
        connection.say(deliver(connection, sidecar, due[:RCPTS_PER_TRANSACTION], body, answered))

    def _fetch(self, one: Destination, traffic: Traffic) -> None:
        """Have the next messages read, so that connections need not wait for the disk.  Where the disk is
        behind nothing is given out, because a crash would send it again."""
        has_taker = any(not (other.is_late or other.is_leaving) for other in traffic.connections)
        is_full = traffic.is_fetching or len(traffic.fetched) > FETCH_LOW
        if is_full or not has_taker or self.queue.recorder.is_behind:
            return
        entries = one.take(FETCH_MOST, self.loop.now)
        if entries:
            traffic.is_fetching = True
            self.spool.ask(functools.partial(self._on_read, one, entries), "read",
                           [entry.id for entry in entries])

    def _on_read(self, one: Destination, entries: List[Entry], results: Any) -> None:
        traffic = self.of(one)
        traffic.is_fetching = False
        if isinstance(results, Exception):
            results = [results] * len(entries)
        unread = []
        for entry, result in itertools.zip_longest(entries, results):       # some were not read
            if isinstance(result, Exception):
                self.queue.on_fault(one, entry, result)
            elif result is None or entry.is_held or one.is_held or not traffic.connections:
                unread.append(entry)
            else:
                traffic.fetched.append((entry, *result))
        one.give_back(*unread)
        self.attend(one)

    def give_back_fetched(self, one: Destination) -> None:
        """What was read ahead and no connection has."""
        fetched = self.of(one).fetched
        one.give_back(*(entry for entry, _, _ in fetched))
        fetched.clear()

    # -- dialling

    def _may_dial(self, one: Destination) -> bool:
        """Dead servers hold a thread for long, and senders' servers are many: neither may take the last."""
        is_first = one.state is not Primary.DOWN and not one.cfg.is_notices
        most = DIALS_MAX if is_first else DIALS_MAX - DIALS_RESERVED
        if self.dialling < most and len(self.all()) < OUTBOUND_MAX:
            return True
        self.starved[one.name] = None
        return False

    def _dial(self, one: Destination, traffic: Traffic) -> None:
        most = max(HANGING_MAX, one.limit * one.is_steady)
        if one.is_urged and len(traffic.dials) >= most:         # they hang, and a fresh one is asked for
            # An ETRN each second does not cut off every dial to a primary that is slow to greet.
            is_late = traffic.dials[0].began < self.loop.now.mono - LATE_S
            traffic.dials.pop(0 if is_late else -1).cut()
        one.on_dial(self.loop.now)
        self.dialling += 1
        mine = Dial(self.loop.now.mono)
        plan = self.plan(one)._replace(mine=mine)
        traffic.dials.append(mine)
        self.loop.in_thread(lambda: dial(plan), functools.partial(self._on_dialled, one, mine))

    def plan(self, one: Destination) -> Plan:
        cfg, now = self.queue.cfg, self.loop.now
        known = tuple(one.route) if now.wall - one.route_seen < one.cfg.lifetime else ()
        is_smarthost = one.name.startswith(NOTICES) and isinstance(cfg.bounces_route, Endpoint)
        login = (cfg.bounces_username, cfg.bounces_password)
        primary = (Endpoint(one.home, SMTP_PORT),) if one.home else one.cfg.primary
        return Plan(one.name, one.cfg, primary, cfg.hostname, Resolver(cfg.nameservers),
                    self.queue.listeners, known, login if is_smarthost and login[0] else None)

    def _on_dialled(self, one: Destination, mine: Dial, result: Any) -> None:
        self.dialling -= 1
        if isinstance(result, Exception):
            self.log.bug(result)
            result = Dialled(None, "internal error: %r" % result)
        if mine.is_given_up or self.queue.is_stopping:
            if result.client is not None:
                result.client.close()
            return self.attend(one)
        traffic = self.of(one)
        traffic.dials.remove(mine)
        self.queue.note_hosts(one, result.hops)
        if result.warning and result.warning != one.last_error:
            self.log.write("primary", "%s: %s" % (one.label, printable(result.warning)), "warning")
        if result.client is not None:
            one.route, one.route_seen = list(result.hops), self.loop.now.wall
            self.queue.tell(one, one.on(Event.HEARD, self.loop.now))
            self._open(one, result.client)          # which may end it at once
        elif (one.state is Primary.UP and mine.began < one.heard) or not all(
                connection.is_late for connection in traffic.connections):
            one.slow_down(self.loop.now)        # it was heard meanwhile, or takes no more connections
        else:
            self._on_away(one, result.error)
        self.attend(one)

    def _open(self, one: Destination, client: Dialer) -> Connection:
        size = client.esmtp_features.get("size", "").strip()      # RFC 1870 3; it may be anything
        limit = int(size) if re.fullmatch(r"[0-9]{1,18}", size) else 0
        one.size_limit = limit if limit >= SIZE_LEAST else 0
        connection = Connection(one, client, self.loop, self.spool.ask, self._feed, self._on_end)
        if not connection.is_over:
            self.of(one).connections.append(connection)
        return connection

    # -- ends

    def _on_away(self, one: Destination, error: str) -> None:
        """It cannot be reached."""
        self.queue.tell(one, one.on(Event.AWAY, self.loop.now, error))
        while len(self.of(one).dials) > HANGING_MAX:    # of those to a primary that was up
            self.of(one).dials.pop(0).cut()
        self._end_waiting(one, error)

    def on_rejecting(self, one: Destination) -> None:
        """Sending stops: connections end, with what they have not begun given back."""
        self._end_waiting(one, "the primary rejects mail that it should take")
        while self.of(one).dials:       # that were to send beside the canary
            self.of(one).dials.pop().cut()
        for connection in list(self.of(one).connections):
            if not connection.collects:         # who came for several domains goes on with the next
                connection.leave()

    def _end_waiting(self, one: Destination, error: str) -> None:
        """Nothing of it leaves soon: whoever waits for that has an answer."""
        self.give_back_fetched(one)
        questions = self.of(one).questions
        while questions:
            self._answer(questions.popleft(), "down", error)
        for id in [id for id in self.queue.waiters if id in one.entries]:
            self.queue.let_go(id)
        self.queue.log_waiting(one, error)

    def _on_end(self, connection: Connection, error: str) -> None:
        one = connection.destination
        traffic = self.of(one)
        for its in (traffic.connections, traffic.former):
            if connection in its:
                its.remove(connection)
        for text in dict.fromkeys(filter(None, (error, connection.remark))):
            self.log.write("smtp", "%s: %s" % (one.label, text))
        if self.queue.is_stopping or connection.is_former:
            return self.attend(one)
        if connection.collects:
            return self._on_collected(connection.collects, error)
        if all(other.is_late for other in traffic.connections):
            self.give_back_fetched(one)
            if error:
                one.is_proven = False   # the next one is a canary again
        if connection.is_astray:
            one.slow_down(self.loop.now)        # else it has a connection for each message at once
        if connection.answered > FEW_ANSWERS:
            one.hang_ups = 0            # it had its fill of this connection; the next one may come soon
        is_idle = not (connection.awaited or one.entries)       # and there is nothing that it could have got
        is_there = connection.answered or traffic.connections or one.heard > connection.waits_since or any(
            question.is_again for question in traffic.questions)
        if error and (is_there or is_idle):
            if one.on_hang_up(self.loop.now) and connection.answered and not connection.taken:
                self.log.write("primary", "%s: it hangs up after it has answered: %s" % (one.label, error),
                               "warning")
        elif error:
            self._on_away(one, error)
        self.attend(one)

    def part(self, moved: Iterable[Destination], patience_s: float) -> None:
        """These have another primary.  What the former one still says settles the messages that it has, and
        nothing else.  It is not cut off at once: an answer that is under way saves a second copy.  The new
        one does not wait for it."""
        for one in moved:
            traffic = self.of(one)
            while traffic.dials:
                traffic.dials.pop().cut()
            self.give_back_fetched(one)
            former = [other for other in traffic.connections if not other.collects]
            for connection in former:   # all of them first: when one ends the others are given mail
                connection.is_former = True
                traffic.connections.remove(connection)
                traffic.former.append(connection)
                self._mark_late(connection)
            for connection in former:
                connection.leave()
                self.loop.later(patience_s, connection.cut)
            self.attend(one)

    def urge(self, one: Destination) -> None:
        """ETRN and the like: whatever hangs, a fresh connection is made."""
        for connection in self.of(one).connections:
            if connection.is_waiting(TRIGGER_S):
                self._mark_late(connection)
        self.attend(one)

    def _mark_late(self, connection: Connection) -> None:
        """Others go on without it.  No canary waits any more for what is being sent now."""
        one = connection.destination
        connection.is_late = True
        fetched = {entry.id for entry, _, _ in self.of(one).fetched}
        one.late.update(one.by_state[State.SENDING].keys() - fetched)

    def sweep(self) -> None:
        """Once a second: deadlines of replies, answers that are late, and who could not dial before."""
        starved, self.starved = self.starved, {}
        known = self.queue.destinations.all
        for one in [known[name] for name in starved if name in known]:
            self.attend(one)
        for connection in self.all():
            if connection.sweep():
                self._mark_late(connection)
                self.attend(connection.destination)

    def cut(self) -> None:
        for connection in self.all():
            connection.cut()

    # -- ATRN: the client's connection turns around

    def turn_around(self, collected: Sequence[Destination], hop: Hop, sock: socket.socket, early: bytes,
                    on_over: Callable[[], None]) -> Steps:
        """ATRN was granted.  From here on the socket is ours; `on_over` is called when that has ended."""
        for one in collected:
            one.is_collecting, one.last_try = True, self.loop.now.mono
            one.release()
        mine, plan = Dial(), self.plan(collected[0])
        mine.sockets.append(sock)
        self.arriving[mine] = collected
        # No STARTTLS: a client that only passes lines on, like fetchmail, could not take part in it.
        result = yield lambda: greet(plan, hop, sock, "none", early)
        del self.arriving[mine]
        client, error = (None, str(result)) if isinstance(result, Exception) else result
        if client is None:
            sock.close()
            self.log.write("smtp", "%s: %s" % (",".join(one.label for one in collected), error))
            self._on_collected(collected, error)
            return on_over()
        for one in collected:
            self.queue.tell(one, one.on(Event.HEARD, self.loop.now))
            one.is_proven = one.state is not Primary.REJECTING      # who comes is there: no canary
            one.next_try = self.loop.now.mono
        connection = self._open(collected[0], client)
        connection.collects, connection.left = tuple(collected), collections.deque(collected[1:])
        connection.stream.on_closed = on_over
        if connection.is_over:
            self._on_collected(collected, "it broke off")
            return on_over()
        self._feed(connection)

    def _on_collected(self, collected: Sequence[Destination], error: str) -> None:
        for one in collected:
            self.give_back_fetched(one)
            one.is_collecting, one.limit, one.is_proven = False, 1, False
            one.last_error = error or one.last_error
            if one.waits_for:
                one.on(Event.LEFT, self.loop.now)
            self.attend(one)

    def cut_silent(self, collected: Sequence[Destination]) -> None:
        """Whoever collects asks again: the connection before may be one that nobody has hung up.  Not
        while it is we who keep it waiting, nor while the fate of a message is in its hands."""
        since = self.loop.now.mono - ATRN_SILENT_S
        for connection in self.all():
            if (not set(collected).isdisjoint(connection.collects) and not self.queue.recorder.is_behind
                    and connection.stream.moved < since
                    and not any(course.has_body for course in connection.courses)):
                connection.cut()
        for mine, its in self.arriving.items():
            if its[0].last_try < since and not set(collected).isdisjoint(its):
                mine.cut()              # ends the thread that waits for the greeting

    # -- questions (call-ahead)

    def ask(self, one: Destination, address: str, then: Callable[[str, str], None]) -> None:
        """`then` gets good, bad, doubted, silent or down, and a reply; after CALL_AHEAD_S at the latest, but
        the answer is waited for and kept.  A primary is asked for a stranger, too: one that takes any
        address need not be asked again."""
        takes_all = self.queue.recipients.takes_all(one.name, self.loop.now.wall)
        if address and takes_all is None and (one.name, STRANGER) not in self.asked:
            self._put_question(one, STRANGER, "%s@%s" % (secrets.token_hex(8), one.name))
        question = self.asked.get((one.name, address)) or self._put_question(one, address, address)
        question.waiting.append(then)

        def give_up() -> None:
            if then in question.waiting:
                question.waiting.remove(then)
                then("down", "")
        self.loop.later(CALL_AHEAD_S, give_up)
        if one.state is Primary.DOWN:
            one.next_try = self.loop.now.mono
        self.attend(one)

    def _put_question(self, one: Destination, who: str, address: str) -> Question:
        question = self.asked[one.name, who] = Question((one.name, who), address, [])
        self.of(one).questions.append(question)
        return question

    def _on_word(self, connection: Connection, question: Question, word: str, text: str) -> None:
        """A question's answer, or the connection that had it is lost: then it is asked once more."""
        one, now, recipients = connection.destination, self.loop.now, self.queue.recipients
        if connection.is_former or (word == "lost" and question.is_again):
            return self._answer(question, "down", text)         # the primary is another one since, or gone
        if word == "lost":              # the connection's end comes next, and attends to it
            return self.of(one).questions.appendleft(question._replace(is_again=True))
        one.heard = now.mono
        is_itself = one.is_itself(now)
        if not is_itself and (one.state is Primary.REJECTING or (word == "bad" and one.entries)):
            word = "silent"             # it has yet to take what waits for it
        if question.key[1] == STRANGER:
            if word in ("good", "bad"):
                recipients.learn_accept_all(one.name, word == "good", now.wall)
        elif word == "good" or (word == "bad" and is_itself):
            recipients.learn(question.address, word == "good", now.wall)
            if word == "bad" and recipients.is_doubted(one.name, now.wall):
                word = "doubted"
        self._answer(question, word, text)

    def _answer(self, question: Question, word: str, text: str) -> None:
        self.asked.pop(question.key, None)
        for then in question.waiting:
            self.loop.guard(then, word, text)
        question.waiting.clear()


# -- what a transaction brought: for the primary, for its recipients, for the message
#
# A primary that comes back and answers 550 to all: learn() counts the refused messages, and three make
# it `rejecting`; is_final() believes no refusal before `recovery_grace` is over; settle() keeps the
# message as deferred, with the time of the first refusal.

def judge(queue: Queue, one: Destination, connection: Connection, entry: Entry, sidecar: Sidecar,
          due: Sequence[Dict[str, Any]], verdicts: List[Verdict]) -> None:
    """`due`: whose turn it was; those without a verdict go in the next transaction, at once."""
    now, judged = queue.now, []
    people = {person["address"]: person for person in sidecar["recipients"] if person["state"] == QUEUED}
    once_good = {verdict.address for verdict in verdicts if verdict.is_good is not True
                 and queue.recipients.is_good(verdict.address, now.wall)}
    if not connection.is_former:
        learn(queue, one, entry, verdicts, once_good)
    for verdict in verdicts:
        if verdict.kind == "refused":
            since, was_good = people[verdict.address]["refused_since"], verdict.address in once_good
            is_final = one.is_final(now, since, was_good)
            verdict = verdict._replace(kind="bounced" if is_final else "deferred")
        judged.append(verdict)
    if entry.id in queue.waiters:
        if len(verdicts) == len(people) and all(verdict.kind == "refused" for verdict in verdicts):
            return queue.run(queue.hand_back(one, entry, verdicts[0]))
        queue.let_go(entry.id)
    for verdict in judged:
        queue.log_delivery(entry, verdict, str(connection.hop), now.mono - connection.waits_since)
    one.late.add(entry.id)              # a disk that does not take it keeps no other waiting
    queue.run(settle(queue, one, entry, sidecar, due, judged))


def learn(queue: Queue, one: Destination, entry: Entry, verdicts: List[Verdict], once_good: Set[str]) -> None:
    """Of the primary and of recipients.  `once_good`: those not taken now that were good before.  A refusal
    is no word about the recipient: it opens the question, which the primary is asked by itself."""
    now, was, kinds = queue.now, one.state, {verdict.kind for verdict in verdicts}
    if "sent" in kinds:
        limit, open_ones = one.limit, queue.deliveries.of(one).connections
        queue.tell(one, one.on_taken(now, sum(not other.is_late for other in open_ones)))
        if one.limit > limit:           # more may send
            queue.loop.post(queue.deliveries.attend, one)
    elif kinds == {"refused"}:
        queue.tell(one, one.on_refused(now, entry.id, once_good, verdicts[0].response))
    is_turned = one.state is Primary.REJECTING and was is not Primary.REJECTING     # its next try is set
    is_answer = was is Primary.REJECTING or any(verdict.remote for verdict in verdicts)
    is_final = kinds == {"refused"} and one.is_final(now, None, False)
    if "sent" not in kinds and is_answer and not (is_turned or is_final):
        one.on_deferred(now)
    if one.state is Primary.REJECTING or one.cfg.is_notices:
        return      # it is not itself; and who takes our notices is nobody's recipient here
    may_ask = one.cfg.recipients == "verify" and one.is_itself(now)
    for verdict in verdicts:
        if verdict.is_good:
            queue.recipients.learn(verdict.address, True, now.wall)
        elif verdict.is_good is False and may_ask and verdict.address not in once_good:
            queue.deliveries.ask(one, verdict.address, lambda word, text: None)


def settle(queue: Queue, one: Destination, entry: Entry, sidecar: Sidecar, due: Sequence[Dict[str, Any]],
           judged: List[Verdict]) -> Steps:
    """Write the verdicts down; the message stays SENDING until that is done."""
    now, kinds = queue.now, {verdict.kind for verdict in judged}
    one.counters["deferred"] += "deferred" in kinds
    queue.is_dirty = True
    answered = {verdict.address for verdict in judged}
    before = {person["address"]: person for person in sidecar["recipients"] if person["state"] == QUEUED}
    if kinds == {"sent"} and len(answered) == len(before) and not wanted_notices(sidecar, judged):
        yield from queue.recorder.ask("remove", entry.id)
        one.counters["delivered"] += 1
        return queue.leave(one, entry, "delivered")
    # Not all of it is done: when is it tried again?
    left = [person["address"] for person in due if person["address"] not in answered]
    attempts = one.count_attempt(entry, not left)
    pause = one.pause(entry.answers + bool(left), now)
    if any(verdict.status == "4.4.2" for verdict in judged):        # it broke off
        pause = min(pause, PROBE_FIRST_S * 4.0 ** min(entry.answers - 1, 20))
    people: Dict[str, Dict[str, Any]] = {address: {"next_attempt": now.wall} for address in left}
    for verdict in judged:
        person = before[verdict.address]
        since = person["refused_since"]
        if verdict.kind == "deferred" and verdict.status[0] == "5" and verdict.remote:
            since = min(since or now.wall, now.wall)
            if since < now.to_wall(one.recovered):
                since = now.wall        # what it said before it was itself again does not count
        people[verdict.address] = {
            "state": {"sent": DELIVERED, "bounced": BOUNCED}.get(verdict.kind, QUEUED),
            "attempts": person["attempts"] + attempts, "last_attempt": now.wall,
            "next_attempt": now.wall + pause, "last_status": verdict.status,
            "last_response": verdict.response, "last_remote": verdict.remote, "refused_since": since}
    deferred = [verdict.response for verdict in judged if verdict.kind == "deferred"]
    pauses = [person["next_attempt"] - now.wall for address, person in before.items()
              if address not in people]
    pauses += [pause] * bool(deferred)
    done = yield from queue.recorder.record(entry.id, sidecar, judged, people, len(deferred) < len(judged))
    if isinstance(done, Corrupt):
        queue.on_fault(one, entry, done)
    elif done is True:
        end = "bounced" if "bounced" in kinds else "delivered"
        one.counters[end] += 1
        queue.leave(one, entry, end)
    elif done is False and left:
        one.give_back(entry)
        queue.deliveries.attend(one)
    else:
        error = str(done) if isinstance(done, Exception) else "".join(deferred[:1])
        queue.put_off(one, entry, max(0.0, min(pauses, default=pause)), error)


# By the kind of a verdict: the action of the notice that tells of it, RFC 3464 2.3.3.
ACTIONS = {"bounced": "failed", "expired": "failed", "sent": "relayed", "delayed": "delayed"}
# By action: the word of NOTIFY that asks for the notice, and what the log calls it.
NOTICE_NAMES = {"failed": ("FAILURE", "non-delivery notification"),
                "delayed": ("DELAY", "delay notification"),
                "relayed": ("SUCCESS", "delivery status notification")}


class Recorder:
    """What is written down: removals, changed sidecars, and the notices that go before.  Also on a full disk
    it is tried until that takes it, because a delivery that is not written down would happen twice."""

    def __init__(self, queue: Queue) -> None:
        self.queue, self.log = queue, queue.log
        self.waiting = 0                # outcomes that the disk has not taken
        self.is_behind = False          # since these were too many, and until they are half as many

    def ask(self, what: str, id: str, *values: Any, must: bool = True) -> Steps:
        """Until the disk takes it; what need not be, once.  Returns the result, or Corrupt, or what else is
        wrong with what need not be."""
        self.waiting += 1
        self.is_behind = self.is_behind or self.waiting >= UNRECORDED_MAX
        while True:
            result = yield (what, id, *values)
            if not isinstance(result, Exception) or isinstance(result, Corrupt):
                break
            text, done = printable(str(result)), "removed" if what == "remove" else "recorded"
            self.log.write("qmgr", "%s: cannot be %s%s: %s" % (
                id, done, ", trying again" * must, text), "error")
            if not must:
                break
            self.queue.note(id, "deferred", text)
            yield RETRY_DISK_S
        self.waiting -= 1
        if self.is_behind and self.waiting <= UNRECORDED_MAX // 2:
            self.is_behind = False
            for connection in self.queue.deliveries.all():
                self.queue.deliveries.attend(connection.destination)
        if what == "remove" and result is None or result is True:
            self.log.write("qmgr", "%s: removed" % id)
        return result

    def record(self, id: str, sidecar: Sidecar, judged: Sequence[Verdict], people: People,
               must: bool = True) -> Steps:
        """Change the sidecar's recipients, by address, and tell senders of what was judged.  Returns whether
        the message has left the spool, or Corrupt.  Not `must`: a deferral that cannot be written costs
        only knowledge; it returns the error."""
        notices = yield from self._make_notices(sidecar, judged, people)
        # The spool makes notices durable before it marks their cause.
        done = yield from self.ask("record", id, {}, people, notices, must=must)
        if isinstance(done, Corrupt):   # an earlier try may have made them durable all the same
            self.queue.loader.load([own for own, _, _ in notices])
        elif not isinstance(done, Exception):
            for _, data, its in notices:
                self.queue.accept(its, len(data))
        return done

    def _make_notices(self, sidecar: Sidecar, judged: Sequence[Verdict], people: People) -> Steps:
        """Returns for each an ID, the body and the sidecar."""
        wanted = wanted_notices(sidecar, judged)
        target = sidecar["sender"] if "@" in sidecar["sender"] else ""      # not <postmaster> alone
        if not target and wanted:       # a failure without a sender is told to [bounces] postmaster, once
            wanted = {action: its for action, its in wanted.items() if action == "failed"}
            target = "" if sidecar["kind"] == "alert" else self.queue.cfg.bounces_postmaster
            if wanted and (not target or any(one.address == target for one in wanted["failed"])):
                self.log.write("bounce", "%s: double bounce: dropped, nobody to tell" % sidecar["id"])
                wanted = {}
        if not wanted:
            return []
        is_full = sidecar["ret"] == "FULL" and sidecar["size"] <= NOTICE_FULL_MAX and "failed" in wanted
        what = "whole" if is_full else "header"
        found = yield "look", sidecar["id"], what
        while isinstance(found, OSError):
            yield RETRY_DISK_S
            found = yield "look", sidecar["id"], what
        original = found[1] if isinstance(found, tuple) else b""
        told = dict(sidecar, recipients=[dict(one, **people.get(one["address"], {}))
                                         for one in sidecar["recipients"]])
        notices: List[Tuple[str, bytes, Sidecar]] = []
        for action, verdicts in wanted.items():
            id = self.queue.new_id()
            data = format_notice(self.queue.cfg.hostname, target, told, action, verdicts, original,
                                 is_full and bool(original), self.queue.now.wall, secrets.token_hex(12), id)
            notices.append((id, data, self.queue.own_sidecar(id, "notice", target, data)))
            self.log.write("bounce", "%s: %s %s: %s" % (
                told["id"], "sender" if told["sender"] else "postmaster", NOTICE_NAMES[action][1], id))
        return notices


def wanted_notices(sidecar: Sidecar, judged: Sequence[Verdict]) -> Dict[str, List[Verdict]]:
    """By action: those that a notice is wanted for, RFC 3461 4.1.  Without NOTIFY failures are told, and
    delays where the operator says so."""
    notify = {one["address"]: one["notify"] for one in sidecar["recipients"]}
    wanted: Dict[str, List[Verdict]] = {}
    for one in judged:
        action = ACTIONS.get(one.kind, "")
        if action and not (action == "relayed" and one.is_told):
            asked = notify[one.address]
            if NOTICE_NAMES[action][0] in asked if asked else action != "relayed":
                wanted.setdefault(action, []).append(one)
    return wanted


Tell = Callable[[Config, Mapping[str, Any]], str]       # returns what went wrong


class Alerts:
    """Tells people: a program, a web hook, a mail.  What waits for them runs in threads, for each way one
    alert after the other: the end of an outage is not told before its beginning."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.told: Dict[str, str] = {}      # destinations and the trouble of theirs that was told
        self.daily: Dict[str, Time] = {}    # what is told once a day, and when it was
        self.untold: Dict[Tell, Deque[Tuple[Config, Dict[str, Any]]]] = {}

    def on_state(self, one: Destination, event: str, text: str) -> None:
        """A short outage is not worth an alert, nor then its end; sweep() tells of one that lasts."""
        if event == "rejecting" or (event == "up" and self.told.pop(one.name, "")):
            self.tell(event, one, text)

    def sweep(self, free: int, certificate_end: Time) -> None:
        """Outages that have lasted, mail that nears its end, a disk that fills, a certificate that
        nobody renews."""
        now, cfg, known = self.queue.now, self.queue.cfg, self.queue.destinations.all
        for one in known.values():
            waiting, oldest = "%d messages waiting" % len(one.entries), one.oldest
            if oldest is not None and oldest.state is State.HELD:       # it is kept, however old it is
                others = itertools.chain(*(
                    one.by_state[state].values() for state in State if state is not State.HELD))
                oldest = min(others, key=lambda entry: entry.received, default=None)
            left = oldest.deadline - now.mono if oldest is not None else INF
            if one.cfg.is_notices:
                continue
            has_lasted = one.state is Primary.DOWN and now.mono - one.since >= cfg.alerts_after
            if has_lasted and self.told.get(one.name) != "down":
                self.tell("down", one, "down: %s, %s" % (one.last_error, waiting))
            if left < min(ALERT_EXPIRY_S, one.cfg.lifetime / 2):
                self.once_a_day("expiring", one, "mail will be returned to its senders in %s, %s" % (
                    format_duration(left), waiting))
        if free < 2 * cfg.min_free_space:
            self.once_a_day("disk", None, "%s left for the spool; below %s mail is refused" % (
                format_size(free), format_size(cfg.min_free_space)))
        if certificate_end and certificate_end - now.wall < CERTIFICATE_WARNING_S:
            when = "expires in %s" % format_duration(certificate_end - now.wall)
            self.once_a_day("certificate", None, "the certificate %s %s" % (
                cfg.tls_certificate, when if certificate_end > now.wall else "has expired"))

    def once_a_day(self, event: str, one: Optional[Destination], text: str) -> None:
        key = "%s %s" % (event, one.name if one else "")
        if self.queue.now.wall - self.daily.get(key, 0.0) >= DAY_S:
            self.daily[key] = self.queue.now.wall
            about = one.label + ": " if one else ""
            self.queue.log.write("primary" if one else "master", about + printable(text), "warning")
            self.tell(event, one, text)

    def tell(self, event: str, one: Optional[Destination], text: str) -> None:
        cfg = self.queue.cfg
        if event in ("down", "rejecting") and one:
            self.told[one.name] = event
        alert = {"event": event, "domain": one.name if one else "", "text": printable(text),
                 "host": cfg.hostname, "time": self.queue.now.wall, "waiting": len(one.entries) if one else 0}
        if cfg.alerts_mail:
            self._mail(alert)
        for tell, is_wanted in ((run_alert_command, cfg.alerts_command), (post_alert, cfg.alerts_webhook)):
            if is_wanted:
                untold = self.untold.setdefault(tell, collections.deque())
                untold.append((cfg, alert))
                if len(untold) == 1:
                    self.queue.run(self._tell_all(tell))

    def _tell_all(self, tell: Tell) -> Steps:
        untold = self.untold[tell]
        while untold:
            error = yield functools.partial(tell, *untold[0])
            if error:
                self.queue.log.write("master", "alert not told by %s" % printable(str(error)), "error")
            untold.popleft()

    def _mail(self, alert: Dict[str, Any]) -> None:
        cfg, id = self.queue.cfg, self.queue.new_id()
        about = " ".join(filter(None, (alert["domain"], alert["text"])))
        subject = "%s %s" % (alert["domain"] or "relay", alert["event"])
        lines = ["From: etrn_relay <MAILER-DAEMON@%s>" % cfg.hostname, "To: <%s>" % cfg.alerts_mail,
                 "Subject: [etrn_relay %s] %s" % (cfg.hostname, subject),
                 "Date: %s" % format_date(int(alert["time"])), "Message-ID: <%s@%s>" % (id, cfg.hostname),
                 "Auto-Submitted: auto-generated", "MIME-Version: 1.0",
                 "Content-Type: text/plain; charset=us-ascii", "", *textwrap.wrap(about, FOLD_WIDTH)]
        data = "".join(line + "\r\n" for line in lines).encode("ascii", "backslashreplace")
        sidecar = self.queue.own_sidecar(id, "alert", cfg.alerts_mail, data)

        def kept(error: Any) -> None:
            self.queue.log_failure(error)
            if error is None:
                self.queue.accept(sidecar, len(data))
        self.queue.spool.ask(kept, "commit", id, data, [sidecar])


def run_alert_command(cfg: Config, alert: Mapping[str, Any]) -> str:
    """[alerts] command: its words, no shell; the alert as ETRN_* variables and as JSON on standard
    input.  Returns what went wrong, without the command, which may hold a secret."""
    names = {"ETRN_" + key.upper(): str(value) for key, value in alert.items()}
    try:
        subprocess.run(shlex.split(cfg.alerts_command), input=json.dumps(alert).encode("ascii"),
                       timeout=ALERT_S, check=True, env={**os.environ, **names},
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except subprocess.CalledProcessError as error:
        return "command: exit status %d" % error.returncode
    except subprocess.TimeoutExpired:
        return "command: no end within %d s" % ALERT_S
    except (OSError, ValueError) as error:
        return "command: %s" % printable(str(error))
    return ""


def post_alert(cfg: Config, alert: Mapping[str, Any]) -> str:
    """[alerts] webhook: the alert as the JSON body of a POST.  Returns what went wrong."""
    request = urllib.request.Request(cfg.alerts_webhook, json.dumps(alert).encode("ascii"),
                                     {"Content-Type": "application/json"}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=ALERT_S) as answer:
            answer.read(4096)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return "webhook: %s" % printable(str(error), 200)
    return ""


# == 14. CONTROL ===============================================================
# What others may ask of the queue: ETRN and ATRN from the network, commands from
# the control socket.  A command is a generator of JSON objects; None in between
# means "nothing to say now, come back later"; the last one has "exit".  Uses 9 SCHEDULE
# and 13 QUEUE.

def answer_etrn(queue: Queue, what: str, address: str, name: str, username: str = "") -> Reply:
    """RFC 1985 5.3: one line, never 251.  `username`: of a client that authenticated for these domains."""
    known = queue.destinations
    meant = [one for one in known.matching(what) if not one.cfg.is_notices]
    count = sum(len(one.entries) - len(one.by_state[State.HELD]) for one in meant)
    is_owner = bool(username) and all(cfg.username == username for cfg in known.meant(what))
    if not known.serves(what):
        reply = Reply(459, "4.7.1", "Node %s not allowed: not served here" % what)
    elif not may_etrn(known.meant(what), address, is_owner):
        reply = Reply(459, "4.7.1", "Node %s not allowed: not from your address" % what)
    elif queue.loader.error or (meant and all(one.is_held for one in meant)):
        reply = Reply(458, "4.0.0", "Unable to queue messages for node %s" % what)
    else:
        if is_owner:
            queue.move(what, address)
        if queue.loader.is_busy:
            queue.loader.early.add(what)
        is_fresh = queue.flush(meant)
        if count and is_fresh and (is_owner or queue.may_know(address, meant)):
            reply = Reply(253, "2.0.0", "OK, %d pending messages for node %s started" % (count, what))
        else:
            reply = Reply(250, "2.0.0", "OK, queuing for node %s started" % what)
    queue.log.write("flush", "etrn: site=%s, client=%s, messages=%d, reply=%d" % (
        what, format_peer(address, name), count, reply.code))
    return reply


def may_etrn(meant: Sequence[DomainConfig], address: str, is_owner: bool) -> bool:
    """`@name` is as the strictest of the domains it means.  Who has the password may come from
    anywhere, unless nobody may (none)."""
    return all(cfg.etrn == "any" or (is_owner and cfg.etrn != "none") or (
        not isinstance(cfg.etrn, str) and is_within(address, cfg.etrn)) for cfg in meant)


def answer_atrn(queue: Queue, username: str, domains: Sequence[str], address: str, name: str,
                has_tls: bool) -> Tuple[Reply, List[Destination]]:
    """RFC 2645 5.2.1: the reply, and with a 250 those whose mail goes over the client's connection."""
    is_owner = all(queue.cfg.is_owned(domain, username) for domain in domains)
    asked = queue.destinations.collected_by(username, domains, queue.now) if is_owner else []
    meant = [one for one in asked if waiting_at(one)]
    count, problem = sum(map(waiting_at, meant)), why_not_collected(queue, asked)
    if not is_owner:
        reply = Reply(450, "4.7.1", "ATRN request refused: not a domain of yours")
    elif not has_tls and any(one.cfg.tls not in ("none", "may") for one in asked):
        reply = Reply(530, "5.7.0", "Must issue a STARTTLS command first")      # RFC 3207 4
    elif problem:
        queue.deliveries.cut_silent(asked)      # for the next time
        reply = Reply(451, "4.3.0", "Unable to process ATRN request now: %s" % problem)
    elif not meant:
        reply = Reply(453, "4.0.0", "You have no mail")
    else:
        reply = Reply(250, "2.0.0", "OK now reversing the connection")
    queue.log.write("flush", "atrn: site=%s, client=%s, messages=%d, reply=%d" % (
        ",".join(domains or [one.name for one in meant]), format_peer(address, name), count, reply.code))
    return reply, meant


def waiting_at(one: Destination) -> int:
    return len(one.by_state[State.READY]) + len(one.by_state[State.LATER])


def why_not_collected(queue: Queue, asked: Sequence[Destination]) -> str:
    """Why mail cannot be collected now; empty when it can."""
    if queue.loader.is_busy or queue.loader.error:
        return "the spool is being read"
    if any(one.is_collecting for one in asked):
        return "somebody else is collecting it"
    if not any(map(waiting_at, asked)):
        if any(one.is_held and one.entries for one in asked):
            return "the queue is held"
        if any(one.by_state[State.SENDING] for one in asked):
            return "it is being delivered"
    return "shutting down" if queue.is_stopping else ""


Answers = Generator[Optional[Dict[str, Any]], None, None]
Request = Mapping[str, Any]             # "command", "what", "wait"


def collect_status(queue: Queue, connections: int, started: Optional[float], free: int) -> Dict[str, Any]:
    """`started`: monotonic, None where no relay runs."""
    now, domains = queue.now, {}
    messages, octets, held = queue.destinations.sums()
    for one in sorted(queue.destinations.all.values(), key=lambda one: one.name):
        if one.entries or not one.cfg.is_notices:
            is_probing = bool(one.entries) and one.state is not Primary.UP and not one.waits_for
            domains[one.name] = {
                "primary": one.state.value, "since": to_wall(one.since, now), "queued": len(one.entries),
                "bytes": one.octets, "oldest": one.oldest and one.oldest.received, "last_error": one.trouble,
                "next_probe": to_wall(one.next_try, now) if is_probing else None, "held": one.is_held,
                "address": one.home or None, **one.counters}
    return {"version": __version__, "pid": os.getpid() if started is not None else None,
            "uptime": round(now.mono - started, 3) if started is not None else None,
            "connections": connections,
            "spool": {"messages": messages, "bytes": octets, "free": free, "held": held,
                      "corrupt": queue.corrupt, "sick": queue.spool.sick or None,
                      "loading": queue.loader.is_busy},
            "domains": domains}


def to_wall(mono: float, now: Now) -> Time:
    return round(now.to_wall(mono), 3)


def list_entries(queue: Queue, meant: Sequence[Destination], what: str, _: Request) -> Answers:
    """What is not in the sidecars, which the command reads itself: state, next try, expiry, and failed
    attempts to reach the primary."""
    for one in meant:
        entries = [one.entries[what]] if what in one.entries else list(one.entries.values())
        error = one.trouble if one.state is Primary.DOWN or one.waits_for else ""
        for at in range(0, len(entries), LIST_BATCH):
            yield {"error_of": error, "rows": [
                (entry.id, *say_state(one, entry, queue.now), to_wall(entry.deadline, queue.now),
                 one.failed_since(entry)) for entry in entries[at:at + LIST_BATCH]]}
    yield {"exit": EX_OK}


def say_state(one: Destination, entry: Entry, now: Now) -> Tuple[str, Optional[Time]]:
    """An entry's state and next attempt, for --queue."""
    state = {State.HELD: "held", State.SENDING: "delivering"}.get(entry.state, "queued")
    if entry.state is State.HELD or one.waits_for:
        return state, None
    due = entry.due if entry.state is State.LATER else now.mono
    if entry.state is not State.SENDING and one.state is Primary.DOWN:
        due = max(due, one.next_try)
    return state, to_wall(due, now)


def flush_and_watch(queue: Queue, meant: Sequence[Destination], what: str, request: Request) -> Answers:
    """Deliver now.  Unless told not to wait: until each message queued at the start has left or failed
    once."""
    wait = request.get("wait", True)
    if meant and all(one.is_held for one in meant):
        yield {"error": "the queue for %s is held" % what, "exit": EX_TEMPFAIL}
        return
    held = sum(len(one.by_state[State.HELD]) for one in meant)
    watch = Watch(entry.id for one in meant for entry in one.entries.values()
                  if entry.state is not State.HELD)
    queue.watches.append(watch)
    try:
        queue.pardon(meant)
        queue.flush(meant)
        for one in meant:               # also where a flood of flushes costs no walk
            one.flushing.update(watch.left.intersection(one.entries) if not one.waits_for else ())
        queue.log.write("flush", "command: site=%s, messages=%d" % (what, watch.total))
        last = -1
        while wait and watch.left:
            if len(watch.left) == last:
                end_idle(watch, meant)
            else:
                last = len(watch.left)
                yield {"total": watch.total, "left": last}
            yield None
    finally:
        queue.watches.remove(watch)
    waiting = watch.counts["deferred"] + len(watch.left)
    is_away = watch.error and any(one.state is Primary.DOWN for one in meant)
    yield dict(watch.counts, queued=watch.total, waiting=waiting, held=held, reason=watch.error,
               exit=EX_OK if not waiting or not wait else EX_UNAVAILABLE if is_away else EX_TEMPFAIL)


def end_idle(watch: Watch, meant: Sequence[Destination]) -> None:
    """What is not tried in this flush any more is not waited for: its primary is away, or it is held, or
    to be collected."""
    for one in meant:
        for id in watch.left.intersection(one.entries) - one.flushing:
            if one.entries[id].state is not State.SENDING and not one.is_collecting:
                watch.note(id, "deferred", one.trouble)


def change_hold(queue: Queue, meant: Sequence[Destination], what: str, request: Request) -> Answers:
    on = request["command"] == "hold"
    done: List[Any] = []
    if not on and meant and meant[0].is_held and what in meant[0].entries:
        yield {"error": "all of %s is held: release that" % meant[0].label, "exit": EX_TEMPFAIL}
        return
    count = queue.hold(what, on, done.append)
    while not done:
        yield None
    if isinstance(done[0], Exception):
        yield {"error": "cannot be recorded: %s" % printable(str(done[0])), "exit": EX_TEMPFAIL}
    else:
        state = "held" if on else "released"
        queue.log.write("qmgr", "%s: %s by command, %d messages" % (what, state, count))
        yield {"count": count, "exit": EX_OK}


def end_entries(queue: Queue, meant: Sequence[Destination], what: str, request: Request) -> Answers:
    """--delete and --bounce.  What is being sent at this moment is left alone and counted."""
    for one in meant:
        queue.deliveries.give_back_fetched(one)
    pairs = [(one, entry) for one in meant for entry in list(one.entries.values())
             if what not in one.entries or entry.id == what]
    watch = Watch(entry.id for _, entry in pairs)
    queue.watches.append(watch)
    ending = ("deleted",) if request["command"] == "delete" else (
        "bounced", "5.0.0", "Returned by the postmaster of the backup mail server")
    count = busy = 0
    try:
        for number, (one, entry) in enumerate(pairs, 1):
            if number % END_BATCH == 0:
                yield None              # others wait for the loop, too
            if one.entries.get(entry.id) is not entry or entry.state is State.SENDING:
                busy += entry.id in one.entries
                watch.left.discard(entry.id)
            else:
                count += 1
                queue.log.write("qmgr", "%s: %s by command" % (entry.id, ending[0]))
                queue.run(queue.end(one, entry, *ending))
        while watch.left:
            yield None
    finally:
        queue.watches.remove(watch)
    late = watch.counts["deferred"]     # the disk is full, or worse
    yield {"count": count - late, "busy": busy + late, "exit": EX_TEMPFAIL if busy + late else EX_OK}


COMMANDS_OF_QUEUE = {"list": list_entries, "flush": flush_and_watch, "hold": change_hold,
                     "release": change_hold, "delete": end_entries, "bounce": end_entries}


def run_command(queue: Queue, request: Request) -> Answers:
    """Any request of the control socket but "status".  What is wrong with it is said in an answer."""
    command, what = str(request.get("command")), str(request.get("what", "all"))
    if command == "flush" and queue.loader.is_busy:
        queue.loader.early.add(what)            # what is read only later goes, too
    while queue.loader.is_busy and (command != "flush" or request.get("wait", True)):
        yield None                      # what is asked about may not have been read yet
    meant = queue.destinations.matching(what)
    if command not in COMMANDS_OF_QUEUE:
        yield {"error": "unknown command", "exit": EX_USAGE}
    elif what != "all" and not meant and not queue.destinations.serves(what):
        yield {"error": "%s: no such domain or message here" % printable(what, 100), "exit": EX_MISSING}
    else:
        yield from COMMANDS_OF_QUEUE[command](queue, meant, what, request)


# == 15. STATUS ================================================================
# Values in, text out: terminal, mbox, metrics, the status page and the history
# behind its charts.  No file and no socket.  Foreign text goes through
# printable(), in HTML through escape().  Uses 2 LIMITS, 3 GRAMMAR, 6 LOOP (Now),
# 7 SPOOL (states of a recipient), 9 SCHEDULE (states of a primary, counters).

def format_table(rows: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    """Columns padded to their widest cell; those in `right` are flush right."""
    widths = [max(map(len, cells)) for cells in zip(*rows)]
    form = "  ".join("%%%ds" % (width if at in right else -width) for at, width in enumerate(widths))
    return "".join((form % tuple(row)).rstrip() + "\n" for row in rows)


def say_next(at: Optional[Time], now: Time) -> str:
    return "-" if at is None else "in " + format_duration(at - now) if at > now else "now"


def say_age(since: Optional[Time], now: Time) -> str:
    return format_duration(now - since) if since else "-"


def say_moment(at: Time) -> str:
    return time.strftime("%e %b %Y, %H:%M:%S", time.localtime(at))


def public_status(status: Mapping[str, Any]) -> Dict[str, Any]:
    """--status --json and /status.json: the keys that scripts were promised, and no others."""
    keys = ("primary", "since", "queued", "bytes", "oldest", *COUNTERS, "last_error", "next_probe")
    out: Dict[str, Any] = {key: status[key] for key in ("version", "pid", "uptime", "connections")}
    out["spool"] = {key: status["spool"][key] for key in ("messages", "bytes", "free", "held", "corrupt")}
    out["domains"] = {name: {key: one[key] for key in keys}
                      for name, one in status["domains"].items() if is_domain(name)}
    return out


def format_status(status: Mapping[str, Any], now: Time) -> str:
    spool, running = status["spool"], "not running"
    if status["pid"] is not None:
        running = "running for %s, process %d, %s" % (
            format_duration(status["uptime"]), status["pid"], plural(status["connections"], "connection"))
    out = "etrn_relay %s: %s\nspool: %s, %s, %d held, %d corrupt, %s free\n" % (
        status["version"], running, plural(spool["messages"], "message"), format_size(spool["bytes"]),
        spool["held"], spool["corrupt"], format_size(spool["free"]))
    out += "spool SICK: %s\n" % printable(spool["sick"]) if spool["sick"] else ""
    out += "The spool is still being read.\n" if spool["loading"] else ""
    rows = [("DOMAIN", "PRIMARY", "SINCE", "QUEUED", "SIZE", "OLDEST", "NEXT TRY", *map(str.upper, COUNTERS))]
    remarks = ""
    for key, one in status["domains"].items():
        name = printable(say_destination(key))
        rows.append((
            name, one["primary"] + (" (held)" if one["held"] else ""), say_age(one["since"], now),
            str(one["queued"]), format_size(one["bytes"]), say_age(one["oldest"], now),
            say_next(one["next_probe"], now), *(str(one[counter]) for counter in COUNTERS)))
        if one["address"]:
            remarks += "%s: at %s since an authenticated ETRN\n" % (name, printable(one["address"]))
        if one["last_error"]:
            remarks += "%s: %s\n" % (name, printable(one["last_error"]))
    return "%s\n%s\n%s" % (out, format_table(rows, (3, 4, 7, 8, 9, 10, 11)), remarks)


def format_queue(rows: Sequence[Mapping[str, Any]], now: Time) -> str:
    """The rows of --queue --json for people, their sum, and a response of each domain."""
    if not rows:
        return "The queue is empty.\n"
    out = [("ID", "AGE", "SIZE", "STATE", "NEXT TRY", "SENDER", "RECIPIENTS")]
    responses: Dict[str, str] = {}
    for row in rows:
        due = None if row["state"] == "delivering" else row["next_attempt"]
        addresses = ", ".join(one["address"] for one in row["recipients"])
        out.append((row["id"], say_age(row["received"], now), format_size(row["size"]), row["state"],
                    say_next(due, now), "<%s>" % printable(row["sender"], 60), printable(addresses, 120)))
        for one in row["recipients"]:
            if one["last_response"]:
                responses.setdefault(row["domain"], one["last_response"])
    size, held = sum(row["size"] for row in rows), sum(row["state"] == "held" for row in rows)
    lines = ["%s, %s, %d held" % (plural(len(rows), "message"), format_size(size), held)]
    lines += ["%s: %s" % (printable(name), printable(text)) for name, text in responses.items()]
    return format_table(out, (1, 2)) + "\n" + "\n".join(lines) + "\n"


def format_envelope(sidecar: Mapping[str, Any], header: bytes, now: Time) -> str:
    """--show: one message, its recipients and its header."""
    client = {key: value or "none" for key, value in sidecar["client"].items()}
    pairs = [
        ("ID", sidecar["id"] + (", held until --release" if sidecar["held"] else "")),
        ("domain", sidecar["domain"]),
        ("received", "%s, %s ago" % (say_moment(sidecar["received"]), say_age(sidecar["received"], now))),
        ("client", "{address}, HELO {helo}, TLS {tls}".format(**client)),
        ("size", plural(sidecar["size"], "octet")), ("sender", "<%s>" % sidecar["sender"])]
    for one in sidecar["recipients"]:
        pairs.append(("recipient", "<%s>: %s, %s" % (
            one["address"], one["state"], plural(one["attempts"], "attempt"))))
        if one["state"] == QUEUED:
            pairs.append(("", "next try %s, expires %s" % (
                say_next(one["next_attempt"], now), say_next(one["expires"], now))))
        if one["last_response"]:
            when = say_age(one["last_attempt"], now) + " ago: " if one["last_attempt"] else ""
            pairs.append(("", when + one["last_response"]))
    lines = ["%-11s%s" % (label, printable(text)) for label, text in pairs]
    fields = header.decode("utf-8", "replace").split("\r\n")
    return "\n".join([*lines, "", *(printable(field.expandtabs(), 2000) for field in fields)])


def format_progress(total: int, left: int, width: int = 40) -> str:
    done = (total - left) * width // total if total else width
    return "[%s%s] %d of %d" % ("#" * done, "." * (width - done), total - left, total)


def format_mbox(sidecar: Mapping[str, Any], blocks: Iterable[bytes]) -> Iterator[bytes]:
    """One message as mboxrd: LF line ends, From_ lines quoted reversibly, the envelope before the header."""
    sender = re.sub(r"[^!-~]", "_", sidecar["sender"]) or "MAILER-DAEMON"      # readers know only ASCII here
    head = ["From %s %s" % (sender, time.asctime(time.gmtime(sidecar["received"]))),
            "X-Envelope-From: <%s>" % sidecar["sender"]]
    head += ["X-Envelope-To: <%s>" % one["address"]
             for one in sidecar["recipients"] if one["state"] == QUEUED]
    lines = "".join(re.sub(r"[\x00-\x1f\x7f]", "_", line) + "\n" for line in head)
    yield lines.encode("utf-8", "replace")[:-1]
    held = b"\n"                        # the start of a line is judged with the newline before it
    for block in blocks:
        data = (held + block).replace(b"\r\n", b"\n")
        at = max(data.rfind(b"\n"), len(data) - FIELD_MAX)      # behind it From_ or LF may still come
        held = data[at:]
        yield re.sub(rb"\n(>*From )", rb"\n>\1", data[:at])
    last = re.sub(rb"\n(>*From )", rb"\n>\1", held)
    yield last + (b"\n" if last.endswith(b"\n") else b"\n\n")


# -- what is remembered for the page

# An hour shows the worst that it saw.  "off": this relay was not running.
SEVERITY = {"off": 0, "unknown": 1, "up": 2, "rejecting": 3, "down": 4}
TROUBLES = ("rejecting", "down")


class History:
    """For each domain the hours of a week: the peak of its queue and the worst state of its primary."""

    def __init__(self) -> None:
        self.domains: Dict[str, Dict[int, Tuple[int, str]]] = {}    # name: {hour of the epoch: (peak, state)}

    def note(self, name: str, queued: int, state: str, wall: Time) -> None:
        if name not in self.domains and len(self.domains) >= HISTORY_DOMAINS_MAX:
            return                      # those that came first are kept
        hours, hour = self.domains.setdefault(name, {}), int(wall // 3600)
        peak, worst = hours.get(hour, (0, "off"))
        hours[hour] = max(peak, queued), max(worst, state, key=SEVERITY.__getitem__)
        if len(hours) > HISTORY_HOURS:  # the hour farthest from now goes: a wrong clock costs few true ones
            del hours[max(hours, key=lambda one: abs(one - hour))]

    def columns(self, name: str, wall: Time) -> List[Tuple[int, str]]:
        """(peak, state) of each hour, oldest first."""
        hours, hour = self.domains.get(name, {}), int(wall // 3600)
        return [hours.get(one, (0, "off")) for one in range(hour - HISTORY_HOURS + 1, hour + 1)]

    def to_values(self, wall: Time) -> Dict[str, Any]:
        """For history.json.  Domains not seen for a week make room for others."""
        week_ago = wall // 3600 - HISTORY_HOURS
        self.domains = {name: hours for name, hours in self.domains.items() if max(hours) > week_ago}
        return {"format": 2, "domains": {name: [[hour, *hours[hour]] for hour in sorted(hours)]
                                         for name, hours in self.domains.items()}}

    def from_values(self, values: Mapping[str, Any]) -> None:
        """What was kept before the restart.  A domain whose record makes no sense is forgotten."""
        domains = values.get("domains")
        for name, rows in list(domains.items())[:HISTORY_DOMAINS_MAX] if isinstance(domains, dict) else ():
            with contextlib.suppress(TypeError, ValueError, KeyError, OverflowError):
                hours = {int(hour): (int(peak), str(state)) for hour, peak, state in rows[-HISTORY_HOURS:]}
                if hours and all(0 <= peak < 1 << 53 and state in SEVERITY for peak, state in hours.values()):
                    self.domains[name] = hours


class Facts(NamedTuple):
    """All that page, metrics and health show, at one moment."""
    now: Now
    hostname: str
    status: Mapping[str, Any]           # as of collect_status()
    started_at: Time
    min_free: int
    load_error: str                     # why the spool cannot be read, or empty
    certificate_end: Time               # 0 for none
    history: History
    notable: Sequence[Tuple[Time, str, str, str]]   # of the log: (time, service, text, level), newest last


def find_ills(facts: Facts) -> List[str]:
    """What is wrong with the relay itself, for /healthz.  A primary that is down is
    the normal case for a backup, and no reason to restart it."""
    spool, ills = facts.status["spool"], []
    if spool["sick"]:
        ills.append("spool sick: %s; new mail gets 451" % printable(spool["sick"]))
    if facts.load_error:
        ills.append("spool unreadable: %s" % printable(facts.load_error))
    if spool["free"] < max(1, facts.min_free):
        ills.append("disk short: %s free, below min_free_space %s; new mail gets 452" % (
            format_size(spool["free"]), format_size(facts.min_free)))
    return ills


LABEL_ESCAPES = str.maketrans({"\\": r"\\", '"': r'\"', "\n": r"\n"})


def format_metrics(facts: Facts) -> str:
    """Prometheus text format 0.0.4: base units, counters end in _total."""
    status, spool = facts.status, facts.status["spool"]
    domains = {'domain="%s"' % printable(name).translate(LABEL_ESCAPES): one
               for name, one in status["domains"].items() if is_domain(name)}
    families: List[Tuple[str, str, Dict[str, Any]]] = [(name, text, {"": value}) for name, text, value in (
        ("start_time_seconds", "When the relay started, Unix time.", facts.started_at),
        ("healthy", "1 when /healthz answers 200.", not find_ills(facts)),
        ("connections", "SMTP clients connected now.", status["connections"]),
        ("spool_messages", "Messages in the spool, with our own notices.", spool["messages"]),
        ("spool_free_bytes", "Octets the spool's file system can still take.", spool["free"]),
        ("spool_held_messages", "Messages held by an operator.", spool["held"]),
        ("spool_corrupt_messages", "Messages set aside in corrupt/.", spool["corrupt"]),
        ("certificate_expiry_timestamp_seconds", "When the certificate ends, or 0.", facts.certificate_end))]
    families.append(("primary_state", "1 for the state the primary is in.", {
        '{%s,state="%s"}' % (label, state.value): one["primary"] == state.value
        for label, one in domains.items() for state in Primary}))
    for name, key, text in (
            ("queue_messages", "queued", "Messages waiting for the primary."),
            ("queue_bytes", "bytes", "Octets of these messages."),
            ("queue_oldest_timestamp_seconds", "oldest", "When the oldest of these came, Unix time."),
            *(("messages_%s_total" % key, key, "Messages that were %s." % key) for key in COUNTERS)):
        families.append((name, text, {
            "{%s}" % label: one[key] for label, one in domains.items() if one[key] is not None}))
    out = ""
    for name, text, samples in families:
        if samples:
            kind, name = "counter" if name.endswith("_total") else "gauge", "etrn_relay_" + name
            out += "# HELP %s %s\n# TYPE %s %s\n" % (name, text, name, kind)
            out += "".join("%s%s %.16g\n" % (name, labels, value) for labels, value in samples.items())
    return out


# -- the page

PAGE_STYLE = """
:root{color-scheme:light dark;--bg:#f4f5f7;--card:#fff;--ink:#1a1e24;--dim:#5d6673;--rule:#e3e6ea;
--good:#1b8a52;--bad:#cf3a35;--warn:#b46b00}
@media(prefers-color-scheme:dark){:root{--bg:#0e1116;--card:#161b22;--ink:#e6eaf0;--dim:#97a1ae;
--rule:#2b323c;--good:#43c07f;--bad:#ff6f69;--warn:#e5a93b}}
.good,.up{--hue:var(--good)}
.bad,.down,.error{--hue:var(--bad)}
.warn,.rejecting,.held,.warning{--hue:var(--warn)}
*{box-sizing:border-box;margin:0;padding:0}
body{background:var(--bg);color:var(--ink);font:15px/1.45 system-ui,"Segoe UI",Roboto,Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:20px 14px;overflow-wrap:anywhere}
h1,h2{font-size:19px}
small,dt,figcaption,footer,.dim{color:var(--dim);font-size:13px;font-weight:400}
header,footer,figcaption,.title,.facts,li{display:flex;flex-wrap:wrap;align-items:baseline;gap:4px 14px}
header,footer,figcaption{justify-content:space-between}
.card{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:15px 18px;margin:14px 0}
.banner{border-left:5px solid var(--hue);margin:8px 0;font-weight:600}
.pill{font-size:12px;border-radius:99px;padding:1px 9px;border:1px solid;color:var(--hue,var(--dim))}
dl{display:grid;gap:12px 20px;grid-template-columns:repeat(auto-fit,minmax(130px,1fr))}
dd{font-size:20px;font-weight:600}
small{display:block}
.facts dl,.facts figure{flex:2 1 270px;margin-top:12px}
.facts figure{flex-grow:5}
svg{width:100%;height:76px;margin:4px 0;border-bottom:1px solid var(--rule);fill:var(--rule)}
path{fill:var(--hue)}
li{padding:7px 0;border-top:1px solid var(--rule);overflow:hidden}
ol:first-child li:first-child{border:0}
li .dim:first-child{min-width:90px}
.text{flex:1 1 300px;color:var(--hue,var(--ink))}
a{color:inherit}
pre{white-space:pre-wrap;font:14px/1.5 ui-monospace,Consolas,monospace}
form{display:flex;flex-wrap:wrap;gap:8px 14px;align-items:center}
input,button{font:inherit;color:inherit;background:var(--bg);border:1px solid var(--rule);border-radius:8px;
padding:5px 11px}
input{flex:1 1 220px;min-width:0}
"""
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
%s<title>%s</title><style>%s</style></head>
<body><main>
<header><h1>%s</h1><p class="dim">%s</p></header>
%s</main></body></html>
"""
REFRESH = '<meta http-equiv="refresh" content="%d">\n' % PAGE_REFRESH_S
FOOT = """<footer><a href="/metrics">metrics</a><a href="/status.json">status.json</a>
<a href="/healthz">healthz</a></footer>
"""
# The page's one style sheet by its hash, and nothing else from anywhere.
PAGE_POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; style-src 'sha256-%s'"
    % base64.b64encode(hashlib.sha256(PAGE_STYLE.encode("ascii")).digest()).decode("ascii"))


def escape(text: str) -> str:
    """Any text, for HTML and for attributes in double quotes."""
    return html.escape(printable(text))


def format_page(facts: Facts) -> str:
    """Domains in trouble come first, then those where most mail waits."""
    status, host, now, end = facts.status, escape(facts.hostname), facts.now.wall, facts.certificate_end
    spool, domains = status["spool"], status["domains"]
    names = sorted(filter(is_domain, domains), key=lambda name: (
        domains[name]["primary"] not in TROUBLES, -domains[name]["queued"], name))
    out = ['<p class="card banner %s">%s</p>\n' % (kind, escape(text))
           for kind, text in find_news(facts, names)]
    out.append('<section class="card">%s</section>\n' % _format_list(
        ("Waiting", format(spool["messages"], ","), "%s, %d held, %d corrupt" % (
            format_size(spool["bytes"]), spool["held"], spool["corrupt"])),
        ("Disk left", format_size(spool["free"]), "refuses below " + format_size(facts.min_free)),
        ("Connections", format(status["connections"], ","), "SMTP clients now"),
        ("Certificate ends", say_next(end or None, now), say_moment(end) if end else "no STARTTLS")))
    out += [_format_domain(name, facts) for name in names[:PAGE_DOMAINS_MAX]]
    if len(names) > PAGE_DOMAINS_MAX:
        out.append('<p class="card dim">And %d domains, less urgent; --status shows them all.</p>\n' % (
            len(names) - PAGE_DOMAINS_MAX))
    events = "".join('<li class="%s"><span class="dim">%s %s</span><span class="text">%s</span></li>' % (
        escape(level), say_moment(at), escape(service), escape(text))
        for at, service, text, level in reversed(facts.notable))
    out.append('<section class="card"><h2>Recent events</h2><ol>%s</ol></section>\n%s' % (events, FOOT))
    remark = "etrn_relay %s, up %s, process %s; %s local time" % (
        escape(status["version"]), format_duration(status["uptime"] or 0.0), status["pid"], say_moment(now))
    return PAGE % (REFRESH, "(%d) %s" % (spool["messages"], host), PAGE_STYLE, host, remark, "".join(out))


def find_news(facts: Facts, names: Sequence[str]) -> List[Tuple[str, str]]:
    """What a postmaster must know first: (good, warn or bad; a sentence)."""
    domains = facts.status["domains"]
    out = [("bad", ill[0].upper() + ill[1:] + ".") for ill in find_ills(facts)]
    for kind, state in (("bad", "rejecting"), ("warn", "down")):
        its = [name for name in names if domains[name]["primary"] == state]
        if its:
            listed, queued = printable(", ".join(its), 100), sum(domains[name]["queued"] for name in its)
            out.append((kind, "Primary %s: %s.  Waiting: %s." % (state, listed, plural(queued, "message"))))
    if facts.status["spool"]["loading"]:
        out.append(("warn", "The spool is still being read; the numbers below are not complete."))
    return out or [("good", "All is well.")]


def _format_list(*pairs: Tuple[str, str, str]) -> str:
    """A description list of (label, value, remark); the last two are HTML."""
    return "<dl>%s</dl>" % "".join(
        "<div><dt>%s</dt><dd>%s<small>%s</small></dd></div>" % pair for pair in pairs)


def _format_domain(name: str, facts: Facts) -> str:
    one, now = facts.status["domains"][name], facts.now.wall
    return "".join((
        '<section class="card"><div class="title"><h2><a href="/queue/%s">%s</a></h2>'
        '<span class="pill %s">%s</span>%s' % (
            escape(name), escape(name), one["primary"], one["primary"],
            '<span class="pill held">held</span>' if one["held"] else ""),
        '<span class="dim">since %s, for %s</span></div>' % (
            say_moment(one["since"]), say_age(one["since"], now)),
        '<p class="text error">%s</p>' % escape(one["last_error"]) if one["last_error"] else "",
        '<div class="facts">',
        _format_list(("Waiting", format(one["queued"], ","), format_size(one["bytes"])),
                     ("Oldest", say_age(one["oldest"], now), "next try " + say_next(one["next_probe"], now))),
        _format_chart(facts.history.columns(name, now), now),
        '</div><p class="dim">%s</p></section>\n' % ", ".join(
            "%s %s" % (format(one[key], ","), key) for key in COUNTERS)))


def _format_chart(columns: Sequence[Tuple[int, str]], now: Time) -> str:
    """A week, a bar for each hour: as high as the queue at its peak, in the colour of the worst state."""
    peak = max(queued for queued, _ in columns)
    bars = dict.fromkeys(SEVERITY, "")
    for hour, (queued, state) in enumerate(columns):
        bars[state] += "M%d 72v-%dh1V72z" % (hour, 4 + 68 * queued // max(peak, 10))
    hours = sum(state in TROUBLES for _, state in columns)
    days = (time.localtime(now - 3600 * ago) for ago in range(len(columns), 0, -24))
    return ('<figure><figcaption><span>7 days, peak <b>%s</b></span><span>%s</span></figcaption>'
            '<svg viewBox="0 0 %d 72" preserveAspectRatio="none" aria-hidden="true">%s</svg>'
            '<figcaption>%s<span>now</span></figcaption></figure>' % (
                format(peak, ","), "trouble in %s" % plural(hours, "hour") if hours else "no trouble",
                len(columns), "".join('<path class="%s" d="%s"/>' % pair for pair in bars.items()),
                "".join(time.strftime("<span>%a</span>", day) for day in days)))


# -- the queue in a browser.  Nothing of a message is ever shown as HTML of its own.

class ShortFields(email.policy.Compat32):
    """Long fields are cut: the parser's time grows with the square of their length.  Raw octets are UTF-8."""

    def header_source_parse(self, sourcelines: Sequence[str]) -> Tuple[str, str]:
        name, value = super().header_source_parse(sourcelines)      # type: ignore[arg-type]
        octets = value[:4 * FIELD_MAX].encode("utf-8", "surrogateescape")
        return name, octets.decode("utf-8", "replace")


SHORT_FIELDS = ShortFields()


def read_fields(header: bytes) -> Dict[str, str]:
    """Decoded, by name in lower case.  The first of each name counts."""
    message = email.parser.BytesHeaderParser(policy=SHORT_FIELDS).parsebytes(header)
    return {name.lower(): decode_field(str(value)) for name, value in reversed(list(message.raw_items()))
            if name.lower() in ("from", "to", "cc", "date", "subject", "message-id")}


def decode_field(text: str) -> str:
    """RFC 2047.  What cannot be decoded stays as it is."""
    with contextlib.suppress(ValueError, LookupError, email.errors.MessageError):
        text = str(email.header.make_header(email.header.decode_header(text)))
    return printable(" ".join(text.split()), FIELD_MAX)


def read_letter(data: bytes, size: int) -> Tuple[str, List[str], str]:
    """`data`: the start of a message of `size` octets.  Whatever is wrong with it, there is something: its
    text; name, type and size of each attachment; what is not shown, and why."""
    data = b"\n".join(data.split(b"\n", LETTER_LINES)[:LETTER_LINES])
    remarks = ["Only the first %s are looked at." % format_size(len(data))] if len(data) < size else []
    made = itertools.count()

    def make(policy: email.policy.Policy = SHORT_FIELDS) -> email.message.Message:
        if next(made) > LETTER_PARTS:
            raise ValueError("it has too many parts")
        return email.message.Message(policy)
    try:
        message = email.parser.BytesParser(make, policy=SHORT_FIELDS).parsebytes(data)
        parts = [part for part in message.walk() if not part.is_multipart()]
    except Exception as error:          # the parser gives up in many ways
        remarks.append("Its structure cannot be read (%s)." % printable(str(error), 100))
        parts = [email.message_from_bytes(b"\n" + data.partition(b"\r\n\r\n")[2])]
    texts: Dict[str, str] = {}
    attachments = []
    for part in parts:
        octets: Any = b""
        charset, name, kind = "utf-8", None, part.get_content_type()
        with contextlib.suppress(Exception):    # of a charset that is none, and of more
            octets = part.get_payload(decode=True)
            name = part.get_filename()
            charset = part.get_content_charset("utf-8")
        if kind.startswith("multipart/"):       # and its boundary is nowhere
            kind = "text/plain"
        is_shown = kind in ("text/plain", "text/html") and part.get_content_disposition() != "attachment"
        if is_shown and name is None and kind not in texts:
            texts[kind] = decode_text(octets, charset)
        else:
            attachments.append("%s (%s, %s)" % (
                decode_field(name or "no name"), printable(kind, 100), format_size(len(octets))))
    text = texts.get("text/plain", "")
    if not text.strip() and "text/html" in texts:
        text = strip_html(texts["text/html"])
        remarks.append("It was HTML.")
    if len(text) > LETTER_TEXT:
        remarks.append("The text is cut.")
    return text[:LETTER_TEXT], attachments, " ".join(remarks)


def decode_text(octets: bytes, charset: str) -> str:
    octets = octets[:4 * LETTER_TEXT]
    try:
        return octets.decode("latin-1" if charset.lower() == "punycode" else charset, "replace")
    except (LookupError, ValueError):   # unknown, or no charset at all
        return octets.decode("utf-8", "replace")


def strip_html(text: str) -> str:
    """The readable text.  No pattern here can take longer than one pass."""
    for pattern, instead in (
            (r"(?is)<!--.*?(?:-->|\Z)|<(script|style|title)\b.*?(?:</\1\b[^<>]*>?|\Z)", ""),
            (r"(?i)</?(?:br|p|div|tr|li|table|h[1-6]|blockquote)\b", r"\n\g<0>"),
            (r"<[^<>]*>", ""),
            (r"&#[0-9]{9,}", "")):      # no character, and int() refuses thousands of digits
        text = re.sub(pattern, instead, text)
    lines = map(str.strip, html.unescape(text).splitlines())
    return "\n".join(line for line in lines if line)


def format_row(known: Tuple[str, str, Optional[Time]], sidecar: Mapping[str, Any], header: bytes,
               query: str, now: Time) -> str:
    """A message in a list, or nothing where `query` is not in it.  `known`: ID, state and next try, as the
    relay knows them."""
    id, state, due = known
    fields = read_fields(header)
    subject, sender = fields.get("subject", ""), fields.get("from") or "<%s>" % sidecar["sender"]
    people = ", ".join(one["address"] for one in sidecar["recipients"] if one["state"] == QUEUED)
    if query.lower() not in "\n".join((sender, people, subject)).lower():
        return ""
    return ('<li><span class="dim">%s</span><span class="text"><a href="/message/%s">%s</a>'
            '<small>%s to %s</small></span><span class="pill %s">%s</span>'
            '<span class="dim">%s, next try %s</span></li>' % (
                say_moment(sidecar["received"]), id, escape(printable(subject, 200)) or "(no subject)",
                escape(printable(sender, 200)), escape(printable(people, 200)),
                state, state, format_size(sidecar["size"]), say_next(due, now)))


def format_list_page(host: str, name: str, rows: Sequence[str], query: str, page: int, total: int,
                     has_more: bool) -> str:
    """`rows`: those of this page, newest first."""
    search = html.escape("?" + urllib.parse.urlencode({"q": query, "page": ""}))
    links = ['<a href="%s%d">newer</a>' % (search, page - 1)] * (page > 1)
    links += ['<a href="%s%d">older</a>' % (search, page + 1)] * has_more
    body = ('<form class="card" action="/queue/%s"><input name="q" value="%s" placeholder='
            '"Sender, recipient or subject"><button>Search</button>'
            '<a href="/queue/%s.mbox">all as mbox</a></form>\n'
            '<section class="card"><ol>%s</ol></section>\n<footer>%s</footer>\n' % (
                escape(name), escape(query), escape(name),
                "".join(rows) or "<li>Nothing here.</li>", " ".join(links)))
    remark = '%s waiting; <a href="/">status</a>' % plural(total, "message")
    if query and total > SEARCH_MESSAGES:
        remark += "; looked for in the newest %d" % SEARCH_MESSAGES
    return PAGE % ("", "%s: %s" % (escape(name), host), PAGE_STYLE, escape(name), remark, body)


def format_names_page(host: str, names: Iterable[str]) -> str:
    links = "".join('<li><a href="/queue/%s">%s</a></li>' % (name, name) for name in map(escape, names))
    body = '<section class="card"><ol>%s</ol></section>\n' % (links or "<li>No mail is waiting.</li>")
    return PAGE % ("", host, PAGE_STYLE, host, "what this token opens", body)


def format_letter_page(host: str, id: str, sidecar: Mapping[str, Any], fields: Mapping[str, str],
                       text: str, attachments: Sequence[str], remark: str) -> str:
    pairs = [(name, fields[name.lower()]) for name in (
        "From", "To", "Cc", "Date", "Subject", "Message-ID") if name.lower() in fields]
    pairs += [("Envelope", "<%s> to %s" % (sidecar["sender"], printable(", ".join(
        "<%s>" % one["address"] for one in sidecar["recipients"]), FIELD_MAX)))]
    pairs += [("Attachment", one) for one in attachments]
    items = "".join('<li><span class="dim">%s</span><span class="text">%s</span></li>' % (name, escape(value))
                    for name, value in pairs)
    lines = (printable(line.expandtabs(), 8 * len(line)) for line in text.splitlines())
    body = ('<section class="card"><ol>%s</ol></section>\n<section class="card"><pre>%s</pre></section>\n'
            '<footer><span class="dim">%s</span></footer>\n' % (
                items, html.escape("\n".join(lines)) or "(no text)", escape(remark)))
    about = 'received %s, %s; <a href="/message/%s.eml">download</a>; <a href="/queue/%s">queue</a>' % (
        say_moment(sidecar["received"]), format_size(sidecar["size"]), id, escape(sidecar["domain"]))
    return PAGE % ("", "%s: %s" % (id, host), PAGE_STYLE,
                   escape(printable(fields.get("subject", ""), 200)) or "(no subject)", about, body)


# == 16. SERVER ================================================================
# The relay: SMTP clients, the status page, the control socket, certificate and
# lists, reload and stop.  All of it runs in the loop.  Uses all before.

class WatchedFiles:
    """Read again when they change on disk.  What cannot be used leaves what was read before in use, and
    is tried again when it changes again."""

    def __init__(self, *paths: str) -> None:
        self.paths = paths
        self.stamp: Tuple[Any, ...] = ()
        self.is_changed()

    def is_changed(self) -> bool:
        """Since the last look.  Also when one can no longer be looked at."""
        last = self.stamp
        try:
            self.stamp = tuple((found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino)
                               for found in map(os.stat, self.paths))
        except OSError as error:
            self.stamp = (str(error),)
        return self.stamp != last


def read_certificate_end(path: str) -> Time:
    """When the first certificate in a PEM file ends; 0 where this Python cannot tell: only a
    private function of ssl can.  Raises OSError, ValueError."""
    decode = getattr(getattr(ssl, "_ssl", None), "_test_decode_cert", None)
    return float(ssl.cert_time_to_seconds(decode(path)["notAfter"])) if decode else 0.0


class Certificate(WatchedFiles):
    """What STARTTLS needs.  `end`: of its validity, 0 where that cannot be read."""

    def __init__(self, certificate: str, key: str) -> None:
        """Raises OSError when they are of no use."""
        super().__init__(certificate, key)
        self._load()

    def _load(self) -> None:
        certificate, key = self.paths
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)
        try:
            for path in self.paths:     # whose error has the name; OpenSSL's has not
                with open(path, "rb"):
                    pass
            context.load_cert_chain(certificate, key, password="")      # a password is not asked for
            self.context, self.end = context, read_certificate_end(certificate)
        except (OSError, ValueError) as error:
            raise OSError(0, "certificate %s: %s" % (certificate, error)) from None

    def renew(self, log: Log) -> None:
        """Before each handshake, and once a second.  Files may not belong together yet."""
        if self.is_changed():
            try:
                self._load()
                log.write("master", "certificate renewed")
            except OSError as error:
                log.write("master", "the certificate cannot be read, the old one stays: %s"
                          % printable(str(error.strerror)), "warning")


class RecipientFile(WatchedFiles):
    """recipients = file:PATH.  One in which no address is left is taken for a failed export: the old
    list stays, and at a start all recipients get 450."""

    def __init__(self, path: str, log: Log) -> None:
        """Raises OSError."""
        super().__init__(path)
        self.addresses: FrozenSet[str] = frozenset()
        self.take(log, read_recipients(path))

    def take(self, log: Log, result: Any) -> None:
        """What read_recipients() returned, or its exception."""
        self.level = "warning"
        if isinstance(result, Exception):
            text = "not read again: %s" % printable(str(result))
        elif not result[0]:
            text = "no address in it: %s" % (
                "the old list stays" if self.addresses else "all recipients are put off")
        else:
            self.addresses, wrong = result
            text = "%d recipients" % len(self.addresses)
            if wrong:
                text += "; not an address in line " + ", ".join(map(str, wrong[:10]))
            else:
                self.level = "info"
        self.remark = "%s: %s" % (self.paths[0], text)
        log.write("master", self.remark, self.level)


def read_recipients(path: str) -> Tuple[FrozenSet[str], List[int]]:
    with open(path, encoding="utf-8", errors="replace") as file:
        return parse_recipients(file.read())


def recipient_paths(cfg: Config) -> List[str]:
    return sorted({one.recipients[5:] for one in cfg.domains.values()
                   if isinstance(one.recipients, str) and one.recipients.startswith("file:")})


def bind(where: Endpoint, backlog: int) -> socket.socket:
    """A listening socket, for IPv6 alone where it is for IPv6.  Raises OSError with the address in it."""
    try:
        family, address = socket_address(where.host, where.port)
        sock = socket.create_server(address, family=family, backlog=backlog)
    except OSError as error:            # Python's own text has the address, too, in another form
        why = (error.strerror or str(error)).partition(" (while ")[0]
        hint = "  (ports below 1024 need root)" if error.errno == errno.EACCES else ""
        raise OSError(error.errno, "cannot listen on %s: %s%s" % (str(where), why, hint)) from None
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)          # connections inherit it
    sock.setblocking(False)
    return sock


def is_spare(where: Endpoint, wanted: Sequence[Endpoint], error: OSError) -> bool:
    """The IPv6 half of "all addresses", which a machine without IPv6 can do without."""
    return (where.host == "::" and where._replace(host="0.0.0.0") in wanted
            and error.errno != errno.EADDRINUSE)


def notify_manager(text: str) -> None:
    """sd_notify(3).  Units that version 0.1 printed wait for it, too.  Nothing where there is no manager."""
    where = os.environ.get("NOTIFY_SOCKET", "")
    if where:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)     # a manager that does not listen must not stop the mail
            sock.sendto(text.encode("ascii"), "\0" + where[1:] if where[0] == "@" else where)      # unix(7)


Welcome = Callable[[socket.socket, str], None]          # gets a connection and its peer's address


class Listener:
    """A listening socket of the loop.  Out of descriptors it rests for a second, and does not spin."""

    def __init__(self, loop: Loop, sock: socket.socket, welcome: Welcome, log: Log) -> None:
        self.loop, self.sock, self.welcome, self.log = loop, sock, welcome, log
        self.is_watched = False
        self.watch()

    def watch(self) -> None:
        if not self.is_watched and self.sock.fileno() >= 0:
            self.is_watched = True
            self.loop.selector.register(self.sock, selectors.EVENT_READ, self._on_ready)

    def rest(self) -> None:
        if self.is_watched:
            self.is_watched = False
            self.loop.selector.unregister(self.sock)

    def close(self) -> None:
        self.rest()
        self.sock.close()

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(*self.sock.getsockname()[:2])

    def _on_ready(self, mask: int) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, where = self.sock.accept()
            except OSError as error:    # nobody is left, or gone again before we looked
                if error.errno in ACCEPT_ERRORS:
                    text = "out of file descriptors or memory: no new connection for %d s" % SWEEP_S
                    self.log.write("smtpd", text, "warning")
                    self.rest()
                    self.loop.later(SWEEP_S, self.watch)
                return
            self.welcome(sock, str(where[0]) if where else "")
            if not self.is_watched:
                return


class Names:
    """The names of clients: of their PTR records, where they lead back to the address.  A flood of
    clients is no flood of questions."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.known: Dict[str, Tuple[str, float]] = {}       # address: (name, monotonic until when)
        self.waiting: Dict[str, List[Callable[[str], None]]] = {}

    def look_up(self, address: str, resolver: Resolver, then: Callable[[str], None]) -> None:
        """`then` gets the name, or "unknown"; at once, when it is known."""
        name, until = self.known.get(address, ("", 0.0))
        if until > self.loop.now.mono:
            then(name)
        elif address in self.waiting:
            self.waiting[address].append(then)
        elif len(self.waiting) >= NAMES_AT_ONCE:
            then("unknown")
        else:
            self.waiting[address] = [then]
            self.loop.in_thread(lambda: resolver.name_of(address), functools.partial(self._on_name, address))

    def _on_name(self, address: str, result: Any) -> None:
        name = "unknown" if isinstance(result, Exception) or not result else result
        self.known[address] = (name, self.loop.now.mono + NAME_KEPT_S)
        if len(self.known) > NAMES_MAX:
            del self.known[next(iter(self.known))]
        for then in self.waiting.pop(address):
            self.loop.guard(then, name)


@dataclasses.dataclass(eq=False)
class Draft:
    """A message on its way to the spool."""
    id: str
    pending: bytearray                  # not asked of the spool yet
    size: int
    asked: int = 0                      # octets asked of it and not answered
    is_whole: bool = False              # its commit was asked: it is the spool's from now on


@dataclasses.dataclass(eq=False)
class Client:
    """One SMTP client: its stream, its session, and its message."""
    session: Session
    network: str
    certificate: Optional[Certificate]
    since: float                        # monotonic, of its coming
    last: float                         # ... and of its last progress
    data_since: float = 0.0
    stream: Stream = dataclasses.field(init=False)
    draft: Optional[Draft] = None
    is_greeted: bool = False            # greet_pause is over
    awaits_name: bool = False           # a MAIL was accepted, and its answer waits for the DNS
    collects: Sequence[Destination] = ()        # what an ATRN just granted is for


WAIT = object()                         # the answer to a question comes later


class SmtpServer:
    """SMTP clients, what they may do, and their messages on the way to the spool."""

    def __init__(self, server: "Server") -> None:
        self.server, self.loop, self.queue, self.log = server, server.loop, server.queue, server.log
        self.clients: Set[Client] = set()
        self.networks: Dict[str, int] = {}      # connections per network
        self.open = 0                           # sockets, those that end or became servers among them
        self.names = Names(self.loop)
        self.rate, self.greylist = Rate(), Greylist()

    @property
    def cfg(self) -> Config:
        return self.server.cfg

    # -- connections

    def welcome(self, sock: socket.socket, address: str, is_odmr: bool = False) -> None:
        self.queue.on_client(address)
        network = "" if self.cfg.is_trusted(address) else client_network(address)
        most = self.cfg.max_connections_per_client
        if self.open >= self.server.most or (network and most and self.networks.get(network, 0) >= most):
            self.log.write("smtpd", "NOQUEUE: reject: CONNECT from %s: 421 4.7.0 too many connections"
                           % format_peer(address))
            with contextlib.suppress(OSError):
                sock.setblocking(False)
                sock.send(Reply(421, "4.7.0", "%s Error: too many connections" % self.cfg.hostname).wire())
                sock.shutdown(socket.SHUT_WR)
            return sock.close()
        token = secrets.token_hex(12) if self.cfg.has_logins else ""
        challenge = "<%s.%d@%s>" % (token, self.loop.now.wall, self.cfg.hostname)
        certificate, now = self.server.certificate, self.loop.now.mono
        session = Session(self.cfg, certificate is not None, address, challenge.encode("ascii"), is_odmr)
        client = Client(session, network, certificate, now, now)
        client.stream = Stream(self.loop, sock, functools.partial(self._guard, client, self._on_data),
                               functools.partial(self._on_end, client))
        client.stream.on_closed = lambda: self._on_closed(client)
        self.clients.add(client)
        self.open += 1
        self.networks[network] = self.networks.get(network, 0) + 1
        self.log.write("smtpd", "connect from %s" % format_peer(address), "debug")
        self.names.look_up(address, self.server.resolver, lambda name: self._on_name(client, name))
        if self.cfg.greet_pause:
            self.loop.later(self.cfg.greet_pause, lambda: self._greet(client))
        else:
            self._greet(client)

    def _greet(self, client: Client) -> None:
        if client in self.clients:
            client.is_greeted = True
            self._act(client, client.session.greet())

    def _on_name(self, client: Client, name: str) -> None:
        """Also one that comes late: it is right for the next message."""
        client.session.name = name
        if client.awaits_name:
            client.awaits_name = False
            self._resume(client, None)

    def _on_data(self, client: Client, data: bytes) -> None:
        if not client.is_greeted:
            reply = Reply(521, "5.5.1", "%s You speak before the banner" % self.cfg.hostname)
            return self._act(client, client.session.shut(reply, "PREGREET"))
        actions = client.session.receive(data)
        if actions or client.session.mode is not Mode.COMMAND:
            client.last = self.loop.now.mono    # one more octet of a command line is no progress
        self._act(client, actions)

    def _resume(self, client: Client, answer: Any) -> None:
        if client.session.waiting is not None and client in self.clients:
            client.last = self.loop.now.mono
            self._guard(client, lambda client: self._act(client, client.session.resume(answer)))

    def _guard(self, client: Client, call: Callable[..., None], *values: Any) -> None:
        """A bug costs the session it is in."""
        try:
            call(client, *values)
        except Exception as error:
            self.log.bug(error)
            self.shut(client, Reply(421, "4.3.0", "%s Internal error" % self.cfg.hostname))

    def _on_end(self, client: Client, why: str) -> None:
        """It sends no more; what it asked is answered all the same."""
        if client.stream.handshake is not None:
            self.log.write("smtpd", "%s from %s" % (why or "TLS handshake failed", client.session.peer))
        if why or client.session.waiting is None:
            self._leave(client)

    def _leave(self, client: Client) -> None:
        self._discard(client)
        self.clients.discard(client)
        client.stream.finish(linger=False)

    def _on_closed(self, client: Client) -> None:
        self._discard(client)
        self.clients.discard(client)
        self.open -= 1
        self.networks[client.network] -= 1
        if not self.networks[client.network]:
            del self.networks[client.network]
        self.log.write("smtpd", "disconnect from %s" % client.session.peer, "debug")

    def shut(self, client: Client, reply: Reply) -> None:
        """End a session from our side."""
        if client in self.clients:
            self._discard(client)
            if client.stream.handshake is not None:
                return client.stream.close()
            self._act(client, client.session.shut(reply))

    def dismiss(self, is_last: bool) -> None:
        """The relay stops: who is in a message may end it, unless this is the last call."""
        for client in list(self.clients):
            session = client.session
            if session.waiting is None and (is_last or session.transaction is None):
                self.shut(client, self._going())

    def _going(self) -> Reply:
        return Reply(421, "4.3.2", "%s Service shutting down" % self.cfg.hostname)

    def _act(self, client: Client, actions: List[Action]) -> None:
        """Carry out what the session wants, in its order."""
        todo, out = collections.deque(actions), []
        while todo:
            action = todo.popleft()
            if isinstance(action, Send):
                out.append(action.data)
            elif isinstance(action, Body):
                self._keep(client, action)
            elif isinstance(action, Discard):
                self._discard(client)
            elif isinstance(action, Note):
                self.log.write("smtpd", action.text)
            elif isinstance(action, Close):
                self.clients.discard(client)
                client.stream.send(b"".join(out))
                return client.stream.finish(linger=not action.at_once)
            elif isinstance(action, Reverse):
                client.stream.send(b"".join(out))
                return self._reverse(client, action.early)
            else:
                answer = self._ask(client, action)
                if answer is not WAIT:
                    todo.extendleft(reversed(client.session.resume(answer)))
                elif action.what == "starttls":
                    client.stream.out += b"".join(out)
                    return client.stream.secure(lambda: self._context(client), lambda: self._on_tls(client))
        if out:
            client.stream.send(b"".join(out))
        self._look(client)

    def _look(self, client: Client) -> None:
        """Read on, or wait for the disk or the client."""
        session, draft, stream = client.session, client.draft, client.stream
        if stream.is_ended and session.waiting is None and client in self.clients:
            return self._leave(client)
        # Some hundreds of commands are carried out at a time, so that no flood of them holds others up.
        stream.piece = COMMANDS_OCTETS if session.mode is Mode.COMMAND else RECEIVE_OCTETS
        is_behind = len(stream.out) >= OUTPUT_MAX or len(session.buffer) >= RECEIVE_OCTETS or (
            draft is not None and draft.asked + len(draft.pending) >= self._share())
        if is_behind != stream.is_paused:
            stream.pause(is_behind)
        if len(stream.out) >= OUTPUT_MAX:
            stream.on_sent = lambda: self._look(client)

    def _context(self, client: Client) -> "ssl.SSLContext":
        assert client.certificate is not None
        client.certificate.renew(self.log)
        return client.certificate.context

    def _on_tls(self, client: Client) -> None:
        sock = client.stream.sock
        assert isinstance(sock, ssl.SSLSocket)
        cipher = sock.cipher()
        self._resume(client, (sock.version() or "TLS", cipher[0] if cipher else "unknown"))

    def _reverse(self, client: Client, early: bytes) -> None:
        """ATRN: the client is a server from now on, once it has our 250."""
        session, stream, came = client.session, client.stream, bytearray(early)
        self.clients.discard(client)
        try:
            host, port = parse_domain(session.helo), int(stream.sock.getpeername()[1])
        except (ValueError, OSError):
            host, port = session.address, 0

        def turn() -> None:
            self.queue.run(self.queue.deliveries.turn_around(
                client.collects, Hop(host, session.address, port), stream.detach(), bytes(came),
                stream.on_closed))
        stream.on_data, stream.on_sent = came.extend, turn
        stream.send(b"")

    # -- questions of a session

    def _ask(self, client: Client, question: Ask) -> Any:
        session, what, value = client.session, question.what, question.value
        if what == "mail":
            return self._judge_mail(client, value)
        if what == "rcpt":
            return self._may_rcpt(client, value)
        if what == "etrn":
            return answer_etrn(self.queue, value, session.address, session.name, session.username)
        if what == "login":
            return self._judge_login(client, value)
        if what == "atrn":
            reply, client.collects = answer_atrn(self.queue, session.username, value, session.address,
                                                 session.name, session.tls is not None)
            return reply
        if what == "commit":
            return self._commit(client, value)
        return WAIT                     # starttls: _act() goes on with that

    def _judge_login(self, client: Client, login: Login) -> Any:
        """None when it is right.  A name that nobody has takes as long as a wrong password."""
        try:
            if login.is_right(self.server.logins.get(login.username) or secrets.token_hex(16)):
                return None
        except ValueError as error:
            self.log.write("smtpd", "AUTH cannot be judged here: %s" % printable(str(error)), "error")
            return Reply(454, "4.7.0", "Temporary authentication failure")
        reply = Reply(535, "5.7.8", "authentication failed")
        self.loop.later(LOGIN_FAILED_S, lambda: self._resume(client, reply))
        return WAIT

    def _judge_mail(self, client: Client, transaction: Transaction) -> Any:
        """None, a refusal, or WAIT for the client's name, which will stand in our Received field."""
        session, most = client.session, self.cfg.max_message_rate
        if self.server.stopping is not None:
            return self._going()
        if most and client.network and self.rate.is_over(client.network, most, self.loop.now):
            return Reply(450, "4.7.1", "Too many messages a minute from your address")
        if self.queue.spool.sick:
            return disk_reply(None)
        if self.server.free < self.cfg.min_free_space + transaction.size:
            return Reply(452, "4.3.1", "Insufficient system storage")
        left = client.since + NAME_WAIT_S - self.loop.now.mono
        if left <= 0 or session.address not in self.names.waiting:
            return None
        client.awaits_name = True
        self.loop.later(left, lambda: self._on_name(client, session.name))
        return WAIT

    def _may_rcpt(self, client: Client, recipient: Recipient) -> Any:
        """None, a refusal, or WAIT while the primary is asked."""
        transaction, address, now = client.session.transaction, recipient.address, self.loop.now
        assert transaction is not None
        one = self.queue.destinations.get(recipient.path.domain, now)
        if exceeds_queue(one, transaction.size):
            return queue_full(one.name)
        if one.size_limit and transaction.size > one.size_limit - RECEIVED_OCTETS:
            return too_big(one.size_limit - RECEIVED_OCTETS)
        if recipient.path.local.lower() == "postmaster":
            return None                 # RFC 5321 4.5.1
        known = self._find_word(one, recipient)
        must_ask = not known or (
            known == "good" and one.cfg.while_up == "defer" and not one.is_known_up(now))
        if not must_ask or not one.may_ask(now):
            return self._judge_rcpt(client, transaction, one, address, known)

        def on_word(word: str, text: str) -> None:
            if client.session.transaction is transaction:
                self._resume(client, self._judge_rcpt(client, transaction, one, address, known or word, text))
        self.queue.deliveries.ask(one, "" if known else address, on_word)
        return WAIT

    def _find_word(self, one: Destination, recipient: Recipient) -> str:
        """good or bad, by list or memory; doubted: not to be believed now; empty: the primary may know."""
        listed, memory, now = one.cfg.recipients, self.queue.recipients, self.loop.now.wall
        if listed == "any":
            return "good"
        if listed == "verify":
            is_good = memory.knows(recipient.address, now)
            if is_good is False and memory.is_doubted(one.name, now):
                return "doubted"
            return {True: "good", False: "bad", None: ""}[is_good]
        if isinstance(listed, str):
            listed = self.server.recipient_files[listed[5:]].addresses
        if not listed:
            return "doubted"
        return "good" if is_listed(recipient.path, listed) else "bad"

    def _judge_rcpt(self, client: Client, transaction: Transaction, one: Destination, address: str,
                    word: str, text: str = "") -> Optional[Reply]:
        """`word`: good, bad or doubted; with any other nobody can say now.  `text`: the primary's own,
        when it was asked just now."""
        if word == "bad":
            said = " (%s)" % printable(text, REPLY_PART_MAX) if text else ""
            return Reply(550, "5.1.1", "<%s>: Recipient address rejected: User unknown%s" % (address, said))
        if word == "doubted" or (word != "good" and one.cfg.unknown_recipients == "defer"):
            return Reply(450, "4.1.1", "<%s>: Recipient cannot be verified now" % address)
        if one.cfg.while_up == "defer" and one.is_known_up(self.loop.now) and not self.greylist.is_taken(
                client.session.address, transaction.sender, address, self.loop.now):
            return Reply(450, "4.3.2", "<%s>: The primary mail server is up, use that" % address)
        return None

    # -- the message on its way to the spool

    def _draft(self, client: Client, transaction: Transaction) -> Draft:
        if client.draft is None:
            client.data_since = 0.0         # each message has its own time
            id = self.queue.new_id()
            wall, recipients = self.loop.now.wall, transaction.recipients
            head = format_received(client.session, transaction, id, wall, recipients)
            client.draft = Draft(id, bytearray(head), len(head))
            self.log.write("smtpd", "%s: client=%s" % (id, client.session.peer))
        return client.draft

    def _keep(self, client: Client, body: Body) -> None:
        draft = self._draft(client, body.transaction)
        draft.pending += body.data
        draft.size += len(body.data)
        if len(draft.pending) >= min(SPILL_OCTETS, self._share()):
            data = bytes(draft.pending)
            draft.asked += len(data)
            draft.pending.clear()

            def written(_: Any) -> None:        # an error is the commit's to tell
                draft.asked -= len(data)
                if client.draft is draft and client in self.clients:
                    self._look(client)
            self.queue.spool.ask(written, "append", draft.id, data)

    def _share(self) -> int:
        """Octets of a body that one client may have in memory."""
        return max(UNWRITTEN_LEAST, min(UNWRITTEN_MAX, UNWRITTEN_TOTAL // max(1, len(self.clients))))

    def _discard(self, client: Client) -> None:
        draft, client.draft = client.draft, None
        if draft is not None and not draft.is_whole:
            self.queue.spool.ask(lambda _: None, "discard", draft.id)

    def _commit(self, client: Client, transaction: Transaction) -> Any:
        """The end of the data is here: 250 waits until all of it is on stable storage, a pair for each
        domain."""
        session, now = client.session, self.loop.now
        domains: Dict[str, Dict[str, Recipient]] = {}
        for recipient in transaction.recipients:        # a recipient named twice gets it once
            domains.setdefault(recipient.path.domain, {}).setdefault(recipient.address, recipient)
        ones = [self.queue.destinations.get(domain, now) for domain in domains]
        draft, limit = self._draft(client, transaction), max(one.size_limit or INF for one in ones)
        full = [one.name for one in ones if exceeds_queue(one, transaction.octets)]
        if full or draft.size > limit:          # SIZE was not declared, or too small
            self._discard(client)
            return queue_full(full[0]) if full else too_big(int(limit) - RECEIVED_OCTETS)
        came_from = {name: getattr(session, name) for name in ("address", "helo", "tls", "name")}
        sidecars: List[Dict[str, Any]] = []
        for domain, people in domains.items():
            id = self.queue.new_id() if sidecars else draft.id
            lifetime = self.queue.destinations.config_of(domain).lifetime
            sidecars.append(make_sidecar(
                id, "mail", domain, transaction.sender,
                [(one.address, one.notify, one.orcpt) for one in people.values()], now.wall,
                now.wall + lifetime, came_from, transaction.body, transaction.smtputf8,
                transaction.ret, transaction.envid))
        data, draft.is_whole = bytes(draft.pending), True
        draft.pending.clear()
        then = functools.partial(self._guard, client, self._on_committed, draft, sidecars)
        self.queue.spool.ask(then, "commit", draft.id, data, sidecars)
        return WAIT

    def _on_committed(self, client: Client, draft: Draft, sidecars: List[Dict[str, Any]], error: Any) -> None:
        def answer(refusal: Optional[Reply]) -> None:
            if client.draft is draft:           # else the client has left; the message is queued all the same
                client.draft = None
                self._resume(client, refusal or Reply(250, "2.0.0", "Ok: queued as %s" % draft.id))
        if error is not None:
            self.log.write("smtpd", "%s: cannot be kept: %s" % (draft.id, printable(str(error))), "error")
            return answer(disk_reply(error if isinstance(error, OSError) else None))
        for sidecar in sidecars[1:]:
            self.log.write("smtpd", "%s: client=%s" % (sidecar["id"], client.session.peer))
        if len(sidecars) == 1:
            return self.queue.accept(sidecars[0], draft.size, answer)
        for sidecar in sidecars:
            self.queue.accept(sidecar, draft.size)
        answer(None)

    # -- once a second

    def sweep(self) -> None:
        limit, now = self.cfg.command_timeout, self.loop.now.mono
        if self.open > self.server.most * STRESS_SHARE:
            limit = min(limit, STRESS_TIMEOUT_S)
        for client in list(self.clients):
            session, stream = client.session, client.stream
            idle = now - max(client.last, stream.moved if stream.out else 0.0)
            in_data = session.mode in (Mode.DATA, Mode.CHUNK)
            client.data_since = (client.data_since or now) if in_data else 0.0
            if stream.handshake is not None:
                if idle > min(limit, HANDSHAKE_S):
                    stream.close()
            elif session.waiting is None:       # else it is our turn
                came = session.transaction.received if session.transaction is not None else 0
                took = now - client.data_since if in_data else 0.0
                if idle > limit or (took > limit and came < took * DATA_RATE_MIN):
                    self.log.write("smtpd", "timeout after %s from %s" % (
                        "DATA" if in_data else session.stage.name, session.peer))
                    self.shut(client, Reply(421, "4.4.2", "%s Error: timeout exceeded" % self.cfg.hostname))


def exceeds_queue(one: Destination, octets: int) -> bool:
    return one.cfg.max_queue_size is not None and one.octets + octets > one.cfg.max_queue_size


def queue_full(domain: str) -> Reply:
    return Reply(452, "4.2.2", "The queue for %s is full" % domain)


def take_request(loop: Loop, sock: socket.socket, end: bytes,
                 then: Callable[[Stream, bytes], None]) -> Stream:
    """A connection that brings one request: `then` gets that when its end has come, a regular expression,
    or when it is too long.  Nothing more is read."""
    request = bytearray()

    def on_data(data: bytes) -> None:
        request.extend(data)
        if len(request) > REQUEST_MAX or re.search(end, request):
            stream.on_data = lambda data: None
            then(stream, bytes(request))
    stream = Stream(loop, sock, on_data, lambda why: stream.close())
    return stream


# What a browser gets of mail is read in threads; the first piece has the head of the answer.
# Raises Corrupt, NotOurs, OSError.
DOWNLOAD = 'Content-Disposition: attachment; filename="%s"'


def read_list(spool: SpoolFolder, host: str, name: str, known: Sequence[Tuple[str, str, Optional[Time]]],
              total: int, query: str, page: int, now: Time) -> Iterator[bytes]:
    """`known`: all that may be on the page, newest first."""
    def rows() -> Iterator[str]:
        for one in known:
            with contextlib.suppress(Corrupt, NotOurs, OSError):    # gone meanwhile, or not to be read
                yield format_row(one, *spool.look(one[0], "header"), query, now)
    skip = (page - 1) * PAGE_MESSAGES if query else 0       # else that was done before
    found = list(itertools.islice(filter(None, rows()), skip, skip + PAGE_MESSAGES + 1))
    text = format_list_page(host, name, found[:PAGE_MESSAGES], query, page, total, len(found) > PAGE_MESSAGES)
    yield format_http(200, text, kind="text/html")


def read_mbox(spool: SpoolFolder, name: str, ids: Sequence[str]) -> Iterator[bytes]:
    yield format_http(200, "", DOWNLOAD % (name + ".mbox"), kind="application/mbox", is_whole=False)
    for id in ids:
        with contextlib.suppress(Corrupt, NotOurs, OSError):
            yield from format_mbox(spool.look(id)[0], spool.stream(id))


def read_message(spool: SpoolFolder, host: str, id: str) -> Iterator[bytes]:
    sidecar, header = spool.look(id, "header")
    data = b"".join(spool.block(id, at) for at in range(0, LETTER_OCTETS, BLOCK_OCTETS))
    page = format_letter_page(host, id, sidecar, read_fields(header), *read_letter(data, sidecar["size"]))
    yield format_http(200, page, kind="text/html")


def read_file(spool: SpoolFolder, id: str) -> Iterator[bytes]:
    size = "Content-Length: %d" % spool.look(id)[0]["size"]
    yield format_http(200, "", DOWNLOAD % (id + ".eml"), size, kind="message/rfc822", is_whole=False)
    yield from spool.stream(id)


def read_on(pieces: Iterator[bytes]) -> Tuple[bytes, bool]:
    """The next octets, many at once, and whether they are the last."""
    out = bytearray()
    for piece in pieces:
        out += piece
        if len(out) >= BLOCK_OCTETS:
            return bytes(out), False
    return bytes(out), True


Say = Callable[..., None]           # sends an answer; and calls its second argument for more
MAIL_NEEDS_TOKEN = "Mail is shown only where a token is set: in [status], or in the domain's own section.\n"
MAIL_PATH = re.compile(r"/(?:queue/([^/]{1,300}?)|message/([0-9A-F]{6,23}))((?(1)\.mbox|\.eml))?")


class HttpServer:
    """The status page: one request, one answer, close.  GET and HEAD alone; the token for all but
    /healthz, which monitors ask and which tells no more than what is wrong.  Above
    PAGE_CONNECTIONS clients wait in the backlog.

    Mail is shown only where a token is set, and read by one thread at a time with rests between, so
    that many readers do not slow it down."""
    listener: Listener          # the server sets it

    def __init__(self, server: "Server") -> None:
        self.server = server
        self.open = 0
        self.readers: Set[Stream] = set()       # of mail
        self.jobs: Deque[Tuple[Stream, Callable[[], Any], Callable[[Any], None]]] = collections.deque()
        self.makers: Dict[str, Tuple[Callable[[Facts], str], str]] = {
            "/": (format_page, "text/html"), "/metrics": (format_metrics, "text/plain; version=0.0.4"),
            "/status.json": (lambda facts: json.dumps(public_status(facts.status), indent=1) + "\n",
                             "application/json"),
            "/healthz": (lambda facts: "\n".join(find_ills(facts) or ["ok"]) + "\n", "text/plain")}

    def welcome(self, sock: socket.socket, address: str) -> None:
        def on_closed() -> None:
            self.open -= 1
            self.readers.discard(stream)
            self.listener.watch()
        stream = take_request(self.server.loop, sock, rb"\n\r?\n", functools.partial(self._answer, address))
        stream.on_closed = on_closed
        self.open += 1
        if self.open >= PAGE_CONNECTIONS:
            self.listener.rest()
        self.server.loop.later(PAGE_TOTAL_S, functools.partial(self._watch, stream))

    def _watch(self, stream: Stream) -> None:
        """Only who reads mail may take long, and must make progress."""
        if stream not in self.readers or self.server.loop.now.mono - stream.moved >= PAGE_STALL_S:
            stream.close()
        else:
            self.server.loop.later(PAGE_TOTAL_S, functools.partial(self._watch, stream))

    def _answer(self, address: str, stream: Stream, request: bytes) -> None:
        words = request.partition(b"\n")[0].decode("latin-1").split()

        def say(answer: bytes, then: Optional[Callable[[], None]] = None) -> None:
            """`then`: called for more, when this has gone out."""
            if words[:1] == ["HEAD"]:
                answer, then = answer[:answer.index(b"\r\n\r\n") + 4], None
            stream.on_sent = then
            stream.send(answer)
            if then is None:
                stream.finish()
        if len(request) > REQUEST_MAX:
            return say(format_http(431, "The request is too long.\n"))
        if len(words) != 3 or not words[2].startswith("HTTP/"):
            return say(format_http(400, "The request is not understood.\n"))
        method, target, version = words
        path, _, query = target.partition("?")
        if not version.startswith("HTTP/1."):       # RFC 9110 2.5
            return say(format_http(505, "HTTP/1.1 is spoken here.\n"))
        if method not in ("GET", "HEAD"):
            return say(format_http(405, "Nothing can be changed here.\n", "Allow: GET, HEAD"))
        given, cfg = read_token(request), self.server.cfg
        mail = MAIL_PATH.fullmatch(path)
        name, id, is_file = mail.groups("") if mail else ("", "", "")
        own = self._domain_of(id) if id else urllib.parse.unquote(name).lower()
        section = cfg.domain(own) if is_domain(own) else None
        tokens = [cfg.status_token, section.token if section else ""]
        if mail and not cfg.status_token and not any(one.token for one in cfg.domains.values()):
            return say(format_http(403, MAIL_NEEDS_TOKEN))
        is_free = path == "/healthz" or not (mail or cfg.status_token)
        if not is_free and not any(is_token(token, given) for token in tokens):
            return self._refuse(say, "%s %s" % (method, printable(target, 100)), path, given, address)
        if mail:
            return self._show_mail(say, stream, own, id, is_file != "", query)
        if path not in self.makers:
            return say(format_http(404, "There is /, /metrics, /healthz and /status.json.\n"))
        make, kind = self.makers[path]
        text = make(self.server.facts())
        code = 503 if path == "/healthz" and text != "ok\n" else 200
        say(format_http(code, text, kind=kind))

    def _refuse(self, say: Say, what: str, path: str, given: Optional[bytes], address: str) -> None:
        homes = {one.name for one in self.server.cfg.domains.values() if is_token(one.token, given)}
        names = [name for name, one in self.server.queue.destinations.all.items() if one.cfg.name in homes]
        if path == "/" and len(names) == 1:
            return say(format_http(302, "", "Location: /queue/" + names[0]))
        if homes:                       # no wrong token, but for other doors
            page = format_names_page(escape(self.server.cfg.hostname), names)
            return say(format_http(200 if path == "/" else 403, page, kind="text/html"))
        answer = format_http(401, "A token is needed.  " + MAIL_NEEDS_TOKEN,
                             'WWW-Authenticate: Basic realm="etrn_relay", charset="UTF-8"')
        if given is None:               # a browser that does not know yet
            return say(answer)
        self.server.log.write("http", "refused: %s from %s: 401 wrong token" % (what, format_peer(address)))
        self.server.loop.later(LOGIN_FAILED_S, lambda: say(answer))

    # -- mail

    def _domain_of(self, id: str) -> str:
        entry = self.server.queue.destinations.matching(id)
        return entry[0].name if entry else self.server.queue.left.get(id, ("",))[0]

    def _show_mail(self, say: Say, stream: Stream, name: str, id: str, is_file: bool, query: str) -> None:
        one, spool = self.server.queue.destinations.all.get(name), self.server.spool
        if id and is_file:
            pieces = read_file(spool, id)
        elif id:
            pieces = read_message(spool, escape(self.server.cfg.hostname), id)
        elif one is None:
            return say(format_http(404, "No mail is waiting for that domain.\n"))
        else:
            pieces = read_mbox(spool, name, list(one.entries)) if is_file else self._list(one, query)

        def explain(error: Exception) -> None:
            if not isinstance(error, (Corrupt, NotOurs, OSError)):
                self.server.log.bug(error)
            if id not in self.server.queue.left:
                return say(format_http(404, "%s: cannot be shown: %s.  The log may tell.\n" % (
                    id or name, printable(str(error)))))
            _, kind, at = self.server.queue.left[id]
            say(format_http(410 if is_file else 200, "%s: %s at %s.\n" % (id, kind, say_moment(at))))
        self.readers.add(stream)
        self._send(say, stream, pieces, explain)

    def _list(self, one: Destination, query: str) -> Iterator[bytes]:
        given = urllib.parse.parse_qs(query)
        search, at = given.get("q", [""])[0].strip()[:FIELD_MAX], given.get("page", ["1"])[0]
        page = min(int(at), 1 << 20) if re.fullmatch("[1-9][0-9]{0,8}", at) else 1
        skip = (page - 1) * PAGE_MESSAGES
        newest = itertools.islice(reversed(one.entries.values()),
                                  *((0, SEARCH_MESSAGES) if search else (skip, skip + PAGE_MESSAGES + 1)))
        known = [(entry.id, *say_state(one, entry, self.server.loop.now)) for entry in newest]
        return read_list(self.server.spool, escape(self.server.cfg.hostname), one.name, known,
                         len(one.entries), search, page, self.server.loop.now.wall)

    def _send(self, say: Say, stream: Stream, pieces: Iterator[bytes],
              explain: Callable[[Exception], None]) -> None:
        """As fast as its reader takes it."""
        def then(result: Any) -> None:
            if isinstance(result, Exception):
                return explain(result)
            data, is_last = result
            say(data, None if is_last else functools.partial(
                self._send, say, stream, pieces, lambda error: stream.close()))
        self.jobs.append((stream, functools.partial(read_on, pieces), then))
        if len(self.jobs) == 1:
            self._work()

    def _work(self) -> None:
        """One job at a time; those of readers who have left are dropped."""
        while self.jobs and self.jobs[0][0].is_closed:
            self.jobs.popleft()
        if not self.jobs:
            return
        (_, work, then), loop, began = self.jobs[0], self.server.loop, self.server.loop.now.mono

        def rested() -> None:
            self.jobs.popleft()
            self._work()

        def done(result: Any) -> None:
            loop.later(PAGE_REST * (loop.now.mono - began), rested)
            then(result)
        loop.in_thread(work, done)


def read_token(request: bytes) -> Optional[bytes]:
    """As bearer, RFC 6750 2.1, or as basic-auth password of any user, RFC 7617.  None without an
    Authorization, empty where it has neither."""
    found = re.search(rb"(?i)\nauthorization:[ \t]*(\w*) *([^\r\n]*)", request)
    if found is None:
        return None
    scheme, data = found.group(1).lower(), found.group(2).rstrip(b" \t")
    if scheme == b"basic":
        with contextlib.suppress(ValueError):
            return base64.b64decode(data, validate=True).partition(b":")[2]
    return data if scheme == b"bearer" else b""


def is_token(token: str, given: Optional[bytes]) -> bool:
    return token != "" and hmac.compare_digest(given or b"", token.encode("utf-8"))


def format_http(code: int, text: str, *fields: str, kind: str = "text/plain", is_whole: bool = True) -> bytes:
    """Where it is not whole, more follows until the connection ends."""
    body = text.encode("utf-8", "backslashreplace")
    lines = ["HTTP/1.0 %d %s" % (code, http.client.responses[code]),
             "Content-Type: %s" % kind + "; charset=utf-8" * is_whole,
             *["Content-Length: %d" % len(body)] * is_whole,
             "Content-Security-Policy: %s" % PAGE_POLICY, "Cache-Control: no-store",
             "X-Content-Type-Options: nosniff", "X-Frame-Options: DENY", "Referrer-Policy: no-referrer",
             "Connection: close", *fields]
    return "\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + body


class ControlServer:
    """The socket that commands come through; only the spool's owner may connect."""

    def __init__(self, server: "Server") -> None:
        self.server = server
        self.listener: Optional[Listener] = None
        self.problem = ""               # told once

    def open(self) -> None:
        """Also again, when somebody has deleted the file."""
        spool = self.server.spool
        path = short_path(os.path.join(spool.path, "control"), spool.root)
        if self.listener is not None and os.path.exists(path):
            return
        self.close()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            spool.check_path()
            spool.remove_control()
            sock.bind(path)
            os.chmod(path, 0o600)       # nobody has connected yet: that needs listen()
            sock.listen(16)
            sock.setblocking(False)
            self.listener = Listener(self.server.loop, sock, self._welcome, self.server.log)
            self.problem = ""
        except OSError as error:
            sock.close()
            last, self.problem = self.problem, printable(str(error))
            if self.problem != last:
                text = "no control socket, commands will not work: %s" % self.problem
                self.server.log.write("master", text, "warning")

    def close(self) -> None:
        if self.listener is not None:
            self.listener.close()
            self.listener = None
            self.server.spool.remove_control()

    def _welcome(self, sock: socket.socket, _: str) -> None:
        def begin(stream: Stream, request: bytes) -> None:
            try:
                answers = self.server.command(json.loads(request))
            except ValueError:          # no command of ours
                return stream.close()
            stream.on_closed = answers.close
            self._go_on(stream, answers)
        take_request(self.server.loop, sock, rb"\n", begin)

    def _go_on(self, stream: Stream, answers: Answers) -> None:
        """As far as the command can go now, and its reader keeps up."""
        again = functools.partial(self._go_on, stream, answers)
        while not stream.is_closing:
            try:
                answer = next(answers)
            except Exception as error:
                self.server.log.bug(error)
                return stream.close()       # its command says so, and does not wait for ever
            if answer is None:
                return self.server.loop.later(COMMAND_POLL_S, again)
            stream.send(json.dumps(answer, separators=(",", ":")).encode("ascii") + b"\n")
            if "exit" in answer:
                return stream.finish()
            if len(stream.out) >= OUTPUT_MAX:
                stream.on_sent = again
                return


class Server:
    """The relay.  run() serves until begin_stop(); a command where no relay runs uses the same without
    listeners."""

    def __init__(self, cfg: Config, spool: Spool, log: Log) -> None:
        self.cfg, self.spool, self.log = cfg, spool, log
        self.loop = Loop(log.bug)
        self.queue = Queue(cfg, SpoolProcess(spool, self.loop), self.loop, log)
        self.queue.spool.on_lost = self._on_spool_lost
        self.resolver = Resolver(cfg.nameservers)
        self.certificate: Optional[Certificate] = None
        self.smtp, self.http, self.control = SmtpServer(self), HttpServer(self), ControlServer(self)
        self.listeners: Dict[Tuple[str, Endpoint], Listener] = {}       # by kind, and as configured
        self.started: Optional[float] = None            # monotonic
        self.started_at = self.loop.now.wall
        self.stopping: Optional[float] = None           # monotonic, when told to stop
        self.most = cfg.max_connections
        self.recipient_files: Dict[str, RecipientFile] = {}
        self.logins: Dict[str, str] = {}                # username: password
        self.history = History()
        self.is_sick = False                            # as the log was told of the spool
        self.free = 0                                   # octets, as the last sweep saw

    # -- opening

    def listen(self, cfg: Config) -> None:
        """Bind what the configuration names, all or nothing; close what it does not name any more.  A
        machine without IPv6 serves the default addresses all the same.  Raises OSError with the address
        in it."""
        welcomes: Dict[str, Welcome] = {
            "smtp": self.smtp.welcome, "odmr": functools.partial(self.smtp.welcome, is_odmr=True),
            "page": self.http.welcome}
        wanted = [("smtp", where) for where in cfg.listen] + [("odmr", where) for where in cfg.odmr_listen]
        wanted += [("page", cfg.status_listen)] if cfg.status_listen is not None else []
        fresh: Dict[Tuple[str, Endpoint], socket.socket] = {}
        with contextlib.ExitStack() as stack:
            for key in [key for key in wanted if key not in self.listeners]:
                try:
                    fresh[key] = stack.enter_context(bind(key[1], LISTEN_BACKLOG))
                except OSError as error:
                    if error.errno == errno.EADDRINUSE and any(
                            own.endpoint.port == key[1].port for own in self.listeners.values()):
                        why = "%s; the relay itself has that port: restart it" % error.strerror
                        raise OSError(error.errno, why) from None
                    if not is_spare(key[1], [where for _, where in wanted], error):
                        raise
                    self.log.write("master", "no IPv6 here: %s" % error.strerror, "warning")
            stack.pop_all()
        for key in [key for key in self.listeners if key not in wanted]:
            self.listeners.pop(key).close()
        for key, sock in fresh.items():
            self.listeners[key] = listener = Listener(self.loop, sock, welcomes[key[0]], self.log)
            if key[0] == "page":
                self.http.listener = listener
                self.log.write("master", "status page on http://%s/" % str(listener.endpoint))
        self.queue.listeners = tuple(one.endpoint for one in self.listeners.values())

    def read_files(self, cfg: Config) -> Tuple[Dict[str, RecipientFile], Dict[str, str]]:
        """Lists of recipients, and who may authenticate.  Raises OSError."""
        files = {path: self.recipient_files.get(path) or RecipientFile(path, self.log)
                 for path in recipient_paths(cfg)}
        logins = {one.username: read_secret(one.password) for one in cfg.domains.values() if one.username}
        for username, password in logins.items():
            if not password:
                raise OSError(0, "username = %s: the password is empty" % printable(username))
        read_secret(cfg.bounces_password)       # at each login, too; a wrong path is said now
        return files, logins

    def load_certificate(self, cfg: Config) -> Optional[Certificate]:
        """One that is in use already renews itself.  Raises OSError for one that is of no use."""
        files = (cfg.tls_certificate, cfg.tls_key)
        if self.certificate is not None and self.certificate.paths == files:
            return self.certificate
        if cfg.tls_certificate and ssl is None:
            self.log.write("master", "this Python has no ssl module: STARTTLS is not offered", "warning")
        return Certificate(*files) if cfg.tls_certificate and ssl is not None else None

    def reserve_files(self) -> None:
        """As many descriptors as we may have.  The spool's process inherits the limit; there a client has
        a body and a sidecar open."""
        self.most, reserved = self.cfg.max_connections, RESERVED_FILES + OUTBOUND_MAX + PAGE_CONNECTIONS
        with contextlib.suppress(OSError, ValueError):
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            wanted = 3 * self.cfg.max_connections + reserved
            if soft < wanted:
                soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            self.most = min(self.cfg.max_connections, max(10, soft - reserved))

    # -- running

    def start(self) -> None:
        """Take up what the spool knows.  Also for a command's own run."""
        self.queue.spool.start()
        self.free = self.spool.free()
        self.queue.corrupt = self.spool.count_corrupt()
        self.queue.load_state(self.spool.load_state("state.json"), self.spool.load_state("recipients.json"))
        self.loop.later(SWEEP_S, self._sweep)

    def run(self) -> None:
        """Serve until told to stop.  What it needs was opened before."""
        self.started = self.loop.now.mono
        self.reserve_files()
        self.control.open()
        self.history.from_values(self.spool.load_state("history.json"))
        self.start()
        self.loop.later(STATE_SAVE_S, self._save_state)
        self.loop.later(HISTORY_SAVE_S, self._save_history)
        self.queue.loader.load()
        smtp, odmr = (" ".join(str(one.endpoint) for key, one in self.listeners.items() if key[0] == kind)
                      for kind in ("smtp", "odmr"))
        self.log.write("master", "started: version %s, process %d, listening on %s%s, spool %s" % (
            __version__, os.getpid(), smtp, ", ODMR on " + odmr if odmr else "", printable(self.spool.path)))
        self.log.flush()
        notify_manager("READY=1")
        self._ping()
        while not self._is_over():
            self.loop.turn(None if self.stopping is None else STOP_POLL_S)
            self.log.flush()
        self.close()

    def _ping(self) -> None:
        """From the loop: when that hangs, the manager hears nothing and starts us anew."""
        notify_manager("WATCHDOG=1")
        self.loop.later(WATCHDOG_S, self._ping)

    def status(self) -> Dict[str, Any]:
        return collect_status(self.queue, self.smtp.open, self.started, self.free)

    def facts(self) -> Facts:
        """For the status page."""
        self._note_history()
        end = self.certificate.end if self.certificate else 0.0
        return Facts(self.loop.now, self.cfg.hostname, self.status(), self.started_at,
                     self.cfg.min_free_space, self.queue.loader.error, end, self.history, self.log.notable)

    def command(self, request: Mapping[str, Any]) -> Answers:
        if request.get("command") == "status":
            while self.queue.loader.is_busy and self.started is None:
                yield None
            yield dict(self.status(), exit=EX_OK)
        else:
            yield from run_command(self.queue, request)

    def _sweep(self) -> None:
        """Once a second."""
        self.loop.later(SWEEP_S, self._sweep)
        self.queue.sweep()
        if self.started is None:
            return
        self.smtp.sweep()
        self.free = self.spool.free()
        if self.queue.spool.sick and not self.is_sick:
            self.is_sick = True
            self.log.write("master", "the spool is sick: %s; no new mail is taken, delivery goes on"
                           % self.queue.spool.sick, "error")
            self._heal()
        for file in self.recipient_files.values():
            if file.is_changed():
                self.loop.in_thread(functools.partial(read_recipients, file.paths[0]),
                                    functools.partial(file.take, self.log))
        self.control.open()
        if self.certificate is not None:
            self.certificate.renew(self.log)
        self.queue.alerts.sweep(self.free, self.certificate.end if self.certificate else 0.0)
        self._note_history()

    def _heal(self) -> None:
        """A sick spool is tried with a probe file until that survives."""
        def tried(result: Any) -> None:
            if result is True:
                self.queue.spool.sick, self.is_sick = "", False
                self.log.write("master", "the spool is well again")
            else:
                self.loop.later(RETRY_DISK_S, self._heal)
        self.queue.spool.ask(tried, "heal")

    def _note_history(self) -> None:
        for one in self.queue.destinations.all.values():
            if not one.cfg.is_notices:
                self.history.note(one.name, len(one.entries), one.state.value, self.loop.now.wall)

    def _save_history(self) -> None:
        self.loop.later(HISTORY_SAVE_S, self._save_history)
        values = self.history.to_values(self.loop.now.wall)
        self.queue.spool.ask(self.queue.log_failure, "save", "history.json", values)

    def _save_state(self) -> None:
        self.loop.later(STATE_SAVE_S, self._save_state)
        if self.queue.is_dirty or self.queue.recipients.is_dirty:
            self.queue.save_state()

    # -- signals

    def on_signal(self, number: int) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            self.begin_stop()
        elif number == signal.SIGHUP:
            self._reload()
            self.queue.loader.load()    # for mail that was copied in
        elif number == signal.SIGUSR1:
            self.log.write("flush", "signal: site=all, messages=%d" % self.queue.destinations.sums()[0])
            self.queue.probe_all()

    def _reload(self) -> None:
        """SIGHUP.  Everything new is built first; what cannot be used is refused, and the old stays,
        whole."""
        old, old_log = self.cfg, self.log.where
        try:
            self.log.reopen()           # after a rotation, whatever comes of the rest
            cfg = read_config(old.file)
            if (cfg.spool, cfg.user) != (old.spool, old.user):
                self.log.write("master", "spool and user change at the next start", "warning")
            files, logins = self.read_files(cfg)
            certificate = self.load_certificate(cfg)
            if cfg.log != old.log:
                self.log.reopen(cfg.log)
            self.listen(cfg)
        except (ConfigError, OSError) as error:
            if self.log.where != old_log:
                self.log.reopen(old_log)
            text = printable(describe(error))
            return self.log.write("master", "not reloaded, the old configuration stays: " + text, "error")
        # Dialogues under way keep the old configuration and certificate to their end; limits are new at once.
        self.cfg, self.recipient_files, self.logins, self.certificate = cfg, files, logins, certificate
        self.resolver = Resolver(cfg.nameservers)
        self.log.level, self.log.host = LEVELS[cfg.log_level], short_name(cfg.hostname)
        self.queue.reconfigure(cfg)
        self.reserve_files()
        self.log.write("master", "configuration reread")

    # -- stopping

    def _on_spool_lost(self, why: str) -> None:
        self.log.write("master", why, "error")
        self.log.flush()

    def begin_stop(self) -> None:
        if self.stopping is None:
            self.stopping = self.loop.now.mono
            self.log.write("master", "stopping")
            for listener in self.listeners.values():
                listener.close()
            self.listeners.clear()
            self.smtp.dismiss(False)
            self.queue.stop()
            self.loop.later(STOP_S / 2, self._cut)

    def _cut(self) -> None:
        self.queue.deliveries.cut()
        self.smtp.dismiss(True)

    def _is_over(self) -> bool:
        """Everything that was acknowledged is safe at any time; the waiting here is for sessions in
        mid-message and for what is being sent."""
        if self.stopping is None:
            return False
        is_quiet = not (self.queue.deliveries.all() or self.queue.recorder.waiting or self.smtp.clients)
        return is_quiet or self.loop.now.mono - self.stopping >= STOP_S

    def close(self) -> None:
        """The spool brings what it was asked to its end, unless the disk does nothing at all."""
        spool, began = self.queue.spool, time.monotonic()
        self.queue.is_stopping = True
        self.queue.deliveries.cut()
        self.queue.keep_attempts()
        self.queue.save_state()
        if self.started is not None:
            self._note_history()
            self._save_history()
        while spool.waiting and (time.monotonic() - max(began, spool.answered) < STOP_DISK_S
                                    and time.monotonic() - began < STOP_BACKLOG_S):
            self.loop.turn(STOP_POLL_S)
        if spool.waiting:
            text = "the disk does not answer: left alone; what was not yet on it was not acknowledged"
            self.log.write("master", text, "error")
        for client in list(self.smtp.clients):
            client.stream.close()
        self.control.close()
        spool.close()
        self.loop.close()
        if self.started is not None:
            self.log.write("master", "stopped")
        self.log.flush()


def short_path(path: str, directory: int) -> str:
    """A Unix socket's path has about a hundred octets; a longer one goes by the open directory."""
    if len(os.fsencode(path)) < 100:
        return path
    return "/proc/self/fd/%d/%s" % (directory, os.path.basename(path))


def read_config(file: str) -> Config:
    """Raises ConfigError; OSError when it cannot be read."""
    try:
        with open(file, encoding="utf-8", newline="") as stream:
            text = stream.read()
    except UnicodeDecodeError as error:
        raise ConfigError(file, error.object[:error.start].count(b"\n") + 1, "not UTF-8") from None
    cfg = parse_config(text, file)
    return cfg if cfg.hostname else dataclasses.replace(cfg, hostname=fully_qualified_name())


def fully_qualified_name() -> str:
    """The machine's own.  This may ask the DNS and wait for it: only who has no `hostname` asks."""
    try:
        return parse_domain(socket.getfqdn())
    except ValueError:
        return "localhost"


# == 17. MAIN ==================================================================
# Arguments, commands, signals, exit status.  Uses all before.

class Failure(Exception):
    """A command cannot do what it was asked: the text for standard error, and the exit status."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


class Parser(argparse.ArgumentParser):
    """Exit status 64 instead of argparse's 2."""

    def error(self, message: str) -> Any:
        raise Failure(message + "\nTry --help.", EX_USAGE)


PASSING_ERRORS = (*_FULL, errno.EIO, errno.EROFS, errno.EADDRINUSE, errno.EADDRNOTAVAIL,
                  *ACCEPT_ERRORS)       # no fault of the configuration


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """With `command`, one of COMMAND_LINE or empty, and `what` it is about.  Raises Failure."""
    parser = Parser(prog="etrn_relay.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE")
    parser.add_argument("-h", "--help", action="store_true")
    for option in ("--version", "--json", "--no-wait", "--raw", "--yes"):
        parser.add_argument(option, action="store_true")
    commands = parser.add_mutually_exclusive_group()
    commands.add_argument("--demo", action="store_true")
    commands.add_argument("--print-unit", choices=sorted(UNITS))
    for name, (_, how, _) in COMMAND_LINE.items():
        commands.add_argument("--" + name, **how)
    given = parser.parse_args(argv)
    for name, value in vars(given).items():
        if value == "":                 # of an unset variable in a script; it must not start a relay
            parser.error("argument --%s: is empty" % name)
    given.command = next((name for name in COMMAND_LINE if getattr(given, name)), "")
    given.what = given.command and getattr(given, given.command)
    for option in ("json", "no_wait", "raw", "yes"):
        names = [name for name, (_, _, options) in COMMAND_LINE.items() if option in options.split()]
        if getattr(given, option) and given.command not in names:
            parser.error("argument --%s: goes with --%s" % (option.replace("_", "-"), ", --".join(names)))
    return given


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = run_given(parse_arguments(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EX_CONFIG
    except Failure as failure:
        return complain(str(failure), failure.code)
    except SpoolBusy as error:
        return complain(str(error), EX_TEMPFAIL)
    except BrokenPipeError:             # the reader of our output has left
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EX_OK
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OSError as error:
        return complain(describe(error), EX_TEMPFAIL if error.errno in PASSING_ERRORS else EX_CONFIG)


def complain(text: str, code: int) -> int:
    print("etrn_relay.py: %s" % text, file=sys.stderr)
    return code


def run_given(given: argparse.Namespace) -> int:
    if given.demo:
        return play_demo()
    if given.help:
        print((__doc__ or "").partition("\nQUEUE\n")[0].rstrip())
    elif given.version:
        print("etrn_relay %s" % __version__)
    elif given.print_unit:
        print(format_unit(given.print_unit, find_config(given.config)), end="")
    elif given.command:
        return COMMAND_LINE[given.command][0](open_config(given.config), given)
    else:
        return serve(open_config(given.config))
    return EX_OK


def find_config(given: Optional[str]) -> str:
    """--config, $ETRN_RELAY_CONFIG, ./etrn.conf, /etc/etrn.conf."""
    named = given or os.environ.get("ETRN_RELAY_CONFIG")
    return named or ("etrn.conf" if os.path.exists("etrn.conf") else "/etc/etrn.conf")


def open_config(given: Optional[str]) -> Config:
    """Raises ConfigError and OSError; where no file was named and none is there, one that helps."""
    try:
        return read_config(find_config(given))
    except FileNotFoundError:
        if given or os.environ.get("ETRN_RELAY_CONFIG"):
            raise
        raise OSError(0, "no configuration: neither ./etrn.conf nor /etc/etrn.conf exists; "
                      "name one with --config, or see --demo") from None


def parse_what(text: str) -> str:
    """all, an ID in upper case, a domain, or @domain."""
    if text.lower() == "all":
        return "all"
    if _ID.fullmatch(text.upper()):
        return text.upper()
    try:
        return "@" + parse_domain(text[1:]) if text[:1] == "@" else parse_domain(text)
    except ValueError:
        raise argparse.ArgumentTypeError("%a is neither a domain, a queue ID, nor all" % text) from None


def may_use(path: str, mode: int) -> bool:
    """As the account that we act for, os.access(2)."""
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


class Account:
    """The `user` option.  The spool and the log are opened as that user, ports are bound and the TLS
    key is read as root, and then root is given up for good."""

    def __init__(self, name: str) -> None:
        """Raises OSError when it cannot work."""
        self.name = name
        if name:
            try:
                found = pwd.getpwnam(name)
            except KeyError:
                raise OSError(0, "user = %s: there is no such account" % name) from None
            self.uid, self.gid = found.pw_uid, found.pw_gid
            if os.geteuid() not in (0, self.uid):
                raise OSError(0, "user = %s: only root can become another account" % name)
            self.name = name if os.geteuid() == 0 and self.uid != 0 else ""

    @contextlib.contextmanager
    def acting(self, spool: str = "") -> Iterator[None]:
        """Within this the process is the account.  `spool` must be of use to it, and one that does not
        exist yet is made for it."""
        if not self.name:
            yield
            return
        if spool and not os.path.isdir(spool):
            os.makedirs(spool, 0o700)
            os.chown(spool, self.uid, self.gid)
        os.initgroups(self.name, self.gid)
        os.setegid(self.gid)
        os.seteuid(self.uid)
        try:
            if spool and not may_use(spool, os.R_OK | os.W_OK | os.X_OK):
                raise OSError(0, "user = %s: that account cannot write the spool %s" % (self.name, spool))
            yield
        finally:
            os.seteuid(0)
            os.setegid(os.getgid())

    def become(self) -> None:
        if self.name:
            os.setgid(self.gid)
            os.setuid(self.uid)


def serve(cfg: Config) -> int:
    """Run the relay in the foreground."""
    sys.setswitchinterval(SWITCH_S)
    for number in (signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)       # until there is something to reread
    account, spool = Account(cfg.user), Spool(cfg.spool)
    with account.acting(cfg.spool):
        spool.open()
        server = Server(cfg, spool, Log(cfg.log, cfg.log_level, cfg.hostname))
        server.recipient_files, server.logins = server.read_files(cfg)
    server.certificate = server.load_certificate(cfg)
    server.listen(cfg)
    account.become()
    first = threading.Thread(target=time.time)
    first.start()
    first.join()        # glibc loads a library when the first thread ends: out of descriptors that aborts us
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: server.loop.post(server.on_signal, number))
    signal.set_wakeup_fd(server.loop.writer.fileno(), warn_on_full_buffer=False)
    release_memory()
    try:
        server.run()
    finally:
        signal.set_wakeup_fd(-1)
        spool.close()
    return EX_OK


def release_memory() -> None:
    """glibc keeps what compiling this file took; a small machine has better use for it."""
    gc.collect()
    gc.freeze()
    with contextlib.suppress(AttributeError, OSError, TypeError):       # no ctypes, or no such function
        ctypes.CDLL(None).malloc_trim(0)


# -- commands

def connect_control(cfg: Config) -> Optional[socket.socket]:
    """To the running relay; None where none runs.  Raises Failure where we may not talk to it."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    directory = -1
    try:
        directory = os.open(cfg.spool, os.O_RDONLY | os.O_CLOEXEC)
        sock.connect(short_path(os.path.join(cfg.spool, "control"), directory))
        return sock
    except OSError as error:
        sock.close()
        if isinstance(error, PermissionError):
            raise Failure("may not talk to the relay: %s" % describe(error), EX_UNAVAILABLE) from None
        return None
    finally:
        close_quietly(directory)


def is_running(cfg: Config) -> bool:
    """One that we may not talk to runs, too."""
    with contextlib.suppress(Failure):
        sock = connect_control(cfg)
        if sock is None:
            return False
        sock.close()
    return True


def ask_relay(cfg: Config, command: str, what: str = "all", wait: bool = True) -> Iterator[Dict[str, Any]]:
    """The answers to a command; the last one has "exit".  Where no relay runs, one without listeners
    gives them, for as long as that takes.  Raises Failure at the end, with what was wrong."""
    request = {"command": command, "what": what, "wait": wait}
    sock = connect_control(cfg)
    answer: Dict[str, Any] = {}
    for answer in ask_own_relay(cfg, request) if sock is None else read_answers(sock, request):
        if "error" not in answer:
            yield answer
    if "exit" not in answer:
        raise Failure("the relay broke off", EX_UNAVAILABLE)
    if "error" in answer:
        raise Failure(answer["error"], answer["exit"])


def read_answers(sock: socket.socket, request: Mapping[str, Any]) -> Iterator[Dict[str, Any]]:
    """None of them is the last when the relay ends meanwhile."""
    with contextlib.suppress(OSError, ValueError), sock, sock.makefile("rb") as lines:
        sock.sendall(json.dumps(request).encode("ascii") + b"\n")
        yield from map(json.loads, lines)


def ask_own_relay(cfg: Config, request: Mapping[str, Any]) -> Iterator[Dict[str, Any]]:
    """A spool that does not exist yet is an empty one."""
    if not os.path.isdir(cfg.spool):
        with tempfile.TemporaryDirectory(prefix="etrn-empty-") as folder:
            yield from ask_own_relay(dataclasses.replace(cfg, spool=folder, user=""), request)
        return
    command, what = request["command"], request["what"]
    # What root would write there the relay could not read.
    with Account(cfg.user).acting(cfg.spool), contextlib.closing(Spool(cfg.spool)) as spool:
        try:
            spool.open(is_relay=False)
        except SpoolBusy:               # a relay that has only just begun will answer in a moment
            sock, end = None, time.monotonic() + RELAY_START_S
            while sock is None and time.monotonic() < end:
                time.sleep(LOCK_POLL_S)
                sock = connect_control(cfg)
            if sock is None:
                raise
            yield from read_answers(sock, request)
            return
        log = Log(cfg.log, "warning" if cfg.log == "stderr" else cfg.log_level, cfg.hostname)
        server = Server(cfg, spool, log)
        queue = server.queue
        queue.spool.may_write = command not in ("status", "list")
        server.start()
        queue.loader.load([what] if _ID.fullmatch(what) else None)      # one message is read alone
        queue.only = ""                 # --flush alone delivers, when the spool has been read
        for answer in server.command(request):
            if answer is not None:
                yield answer
            else:
                server.loop.turn(COMMAND_POLL_S)
                log.flush()
                queue.only = what if command == "flush" and not queue.loader.is_busy else ""
        if command == "flush":
            queue.sweep()               # what was tried often enough now goes back to its sender in this run
        server.close()


def print_answer(given: argparse.Namespace, value: Any, form: Callable[[], str]) -> None:
    """For a program, or for people."""
    print(json.dumps(value, indent=1) if given.json else form().rstrip("\n"))


def show_status(cfg: Config, given: argparse.Namespace) -> int:
    status, = ask_relay(cfg, "status")
    print_answer(given, public_status(status), lambda: format_status(status, time.time()))
    return EX_OK


def show_queue(cfg: Config, given: argparse.Namespace) -> int:
    rows = read_rows(cfg, given.what)
    print_answer(given, rows, lambda: format_queue(rows, time.time()))
    return EX_OK


def read_rows(cfg: Config, what: str) -> List[Dict[str, Any]]:
    """The rows of --queue, oldest first: what the sidecars say, and what the relay knows since they were
    written."""
    rows: List[Dict[str, Any]] = []
    with contextlib.closing(Spool(cfg.spool)) as spool:
        for answer in ask_relay(cfg, "list", what):
            if "rows" in answer and spool.root < 0:
                spool.open_to_read()
            for row in answer.get("rows", ()):
                with contextlib.suppress(Corrupt, NotOurs, OSError, KeyError, TypeError):   # delivered since
                    rows.append(make_row(spool.peek_sidecar(row[0]), row, answer["error_of"]))
    return sorted(rows, key=lambda row: (row["received"], row["id"]))


def make_row(sidecar: Mapping[str, Any], known: Sequence[Any], error: str) -> Dict[str, Any]:
    """`known`: of list_entries().  Attempts to reach a primary that is down are not in the sidecars."""
    _, state, due, expires, failures = known
    recipients = []
    for one in sidecar["recipients"]:
        if one["state"] == QUEUED:
            last = error if error and (failures or not one["last_response"]) else one["last_response"]
            recipients.append({"address": one["address"], "attempts": one["attempts"] + failures,
                               "last_response": last})
    return {**{key: sidecar[key] for key in ("id", "domain", "sender", "size", "received")},
            "state": state, "expires": expires, "next_attempt": due,
            "client": {key: sidecar["client"][key] for key in ("address", "helo", "tls")},
            "recipients": recipients}


def show_message(cfg: Config, given: argparse.Namespace) -> int:
    id = given.what
    with contextlib.closing(Spool(cfg.spool)) as spool:
        try:
            spool.open_to_read()
            if not (_ID.fullmatch(id) and spool.has(id + ".json")):
                raise Corrupt("no such message")
            sidecar, data = spool.look(id, "whole" if given.raw else "header")
        except (Corrupt, NotOurs, FileNotFoundError) as error:
            why = "no such message" if isinstance(error, FileNotFoundError) else error
            raise Failure("%s: %s" % (printable(id, 40), why), EX_MISSING) from None
    if given.raw:
        sys.stdout.buffer.write(data)
        return EX_OK
    rows = read_rows(cfg, id) if is_running(cfg) else []
    news = {one["address"]: one for row in rows for one in row["recipients"]}
    sidecar["recipients"] = [dict(one, **news.get(one["address"], {})) for one in sidecar["recipients"]]
    print_answer(given, dict(sidecar, header=data.decode("utf-8", "replace")),
                 lambda: format_envelope(sidecar, data, time.time()))
    return EX_OK


def export(cfg: Config, given: argparse.Namespace) -> int:
    """The queued messages of a domain as mbox on standard output; they stay queued.  Reads the files
    themselves, so that it says what it must leave out."""
    what, count, code = given.what, 0, EX_OK
    with contextlib.closing(Spool(cfg.spool)) as spool:
        if os.path.isdir(cfg.spool):
            spool.open_to_read()
        for id in spool.list()[0] if spool.root >= 0 else []:
            try:
                for sidecar in spool.read_parts(id):       # of version 0.1: it may have several domains
                    domain, people = sidecar["domain"], sidecar["recipients"]
                    is_meant = what in (domain, "all", id) or (what[:1] == "@" and is_below(domain, what[1:]))
                    if is_meant and any(one["state"] == QUEUED for one in people):
                        spool.verify(id, sidecar, 0)
                        for piece in format_mbox(sidecar, spool.stream(id)):
                            sys.stdout.buffer.write(piece)
                        count += 1
            except (Corrupt, NotOurs) as error:
                if spool.has(id + ".json"):
                    code = complain("%s: left out: %s" % (id, error), EX_TEMPFAIL)
    if not count and what != "all" and not Destinations(cfg).serves(what):
        raise Failure("%s: no such domain here" % what, EX_MISSING)
    return code


def flush(cfg: Config, given: argparse.Namespace) -> int:
    """Without a running relay this one delivers, and so must wait."""
    wait, is_terminal = not given.no_wait, sys.stdout.isatty() and not given.json
    if not wait and not is_running(cfg):
        complain("no relay runs: this command delivers, and waits for it", EX_OK)
        wait = True
    answer: Dict[str, Any] = {}
    for answer in ask_relay(cfg, "flush", given.what, wait):
        if is_terminal and "left" in answer:
            print("\r" + format_progress(answer["total"], answer["left"]), end="", flush=True)
    if is_terminal and answer["queued"] and wait:
        print("\r" + format_progress(answer["queued"], answer["waiting"]))
    code = int(answer.pop("exit"))
    print_answer(given, answer, lambda: "%s: %s" % (given.what, format_flush(answer, wait)))
    return code


def format_flush(answer: Mapping[str, Any], waited: bool) -> str:
    held = ", %s not touched" % plural(answer["held"], "held message") if answer["held"] else ""
    if not answer["queued"]:
        return "nothing is queued" + held
    if not waited:
        return "delivery of %s started%s" % (plural(answer["queued"], "message"), held)
    reason = ": " + printable(answer["reason"]) if answer["waiting"] and answer["reason"] else ""
    return "%d delivered, %d returned, %d still waiting%s%s" % (
        answer["delivered"], answer["bounced"] + answer["expired"], answer["waiting"], held, reason)


ENDINGS = {"hold": "held", "release": "released", "delete": "deleted", "bounce": "returned to their senders"}


def change_queue(cfg: Config, given: argparse.Namespace) -> int:
    """--hold, --release, --delete, --bounce."""
    command, what = given.command, given.what
    if what == "all" and command in ("delete", "bounce") and not given.yes and not is_sure(command):
        print("Nothing was done.")
        return EX_OK
    *_, answer = ask_relay(cfg, command, what)
    busy = "; %d left alone, in delivery at this moment" % answer["busy"] if answer.get("busy") else ""
    print("%s: %s %s%s" % (what, plural(answer["count"], "message"), ENDINGS[command], busy))
    return int(answer["exit"])


def is_sure(command: str) -> bool:
    """Asks who types, or reads what a script gives.  Raises Failure where there is nobody to ask."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print("Really %s all queued mail? [y/N] " % command, end="", flush=True)
    reply = sys.stdin.readline()
    if not reply and not is_terminal:
        raise Failure("--%s all needs --yes" % command, EX_USAGE)
    return reply.strip().lower() in ("y", "yes")


# -- --probe

def know_all(cfg: Config, names: Sequence[str]) -> Tuple[Server, List[Plan]]:
    """A relay that knows what the last one learnt, and does nothing; and the ways to primaries."""
    server = Server(cfg, Spool(cfg.spool), Log("stderr", "error", cfg.hostname))
    server.queue.listeners = cfg.listen + cfg.odmr_listen
    with contextlib.closing(server.spool), contextlib.suppress(OSError):
        server.spool.open_to_read()
        server.queue.load_state(server.spool.load_state("state.json"), {})
    known, now = server.queue.destinations, server.loop.now
    return server, [server.queue.deliveries.plan(known.get(name, now)) for name in names]


def in_time(server: Server, seconds: float, calls: Sequence[Callable[[], Any]]) -> List[Any]:
    """The results of calls that wait beside each other; of one that failed, its exception."""
    results: Dict[int, Any] = {}
    for number, call in enumerate(calls):
        server.loop.in_thread(call, functools.partial(results.setdefault, number))
    end = time.monotonic() + seconds
    while len(results) < len(calls) and time.monotonic() < end:
        server.loop.turn(max(0.0, end - time.monotonic()))
    return [results.get(number, TimeoutError("no answer in time")) for number in range(len(calls))]


def probe(cfg: Config, given: argparse.Namespace) -> int:
    """The route of a domain, and what each host on it answers.  Nothing is sent."""
    if cfg.domain(given.what) is None:
        raise Failure("%s: no such domain here" % given.what, EX_MISSING)
    server, [plan] = know_all(cfg, [given.what])
    route, = in_time(server, PROBE_ROUTE_S, [lambda: find_route(plan)])
    hops, problem = ([], str(route)) if isinstance(route, Exception) else route
    hosts = [dict(hop._asdict(), mail=None, takes_mail=False, error=None) for hop in hops]
    visits = [functools.partial(visit, plan, hop, host) for hop, host in zip(hops, hosts)]
    for host, late in zip(hosts, in_time(server, PROBE_HOSTS_S, visits)):
        host["error"] = host["error"] or late and str(late)
    found = {"domain": plan.name, "primary": format_primary(plan.primary), "error": problem or None}
    print_answer(given, dict(found, hosts=hosts), lambda: "\n\n".join(map(format_probe, (found, *hosts))))
    if any(host["takes_mail"] for host in hosts):
        return EX_OK
    return EX_TEMPFAIL if any(host["mail"] for host in hosts) else EX_UNAVAILABLE


def format_probe(values: Mapping[str, Any]) -> str:
    texts = {key: ", ".join(one) if isinstance(one, list) else str(one)
             for key, one in values.items() if one is not None}
    return "\n".join("%s: %s" % (key, printable(text)) for key, text in texts.items())


def visit(plan: Plan, hop: Hop, found: Dict[str, Any]) -> None:
    """As a delivery does it, up to RCPT.  Of a host that hangs, `found` has what came before."""
    try:
        sock = socket.create_connection((hop.address, hop.port), PROBE_REPLY_S)
        client, problem = greet(plan, hop, sock, plan.cfg.tls)
        if client is None:
            raise PeerError(problem)
        with contextlib.closing(client):
            found.update(warning=problem or None, greeting=client.greeting, extensions=[
                ("%s %s" % one).strip().upper() for one in client.esmtp_features.items()])
            if ssl is not None and isinstance(client.sock, ssl.SSLSocket):
                der = client.sock.getpeercert(True) or b""
                found.update(tls=client.sock.version(), sha256=hashlib.sha256(der).hexdigest())
            for key, command in (("mail", "MAIL FROM:<>"), ("rcpt", "RCPT TO:<postmaster@%s>" % plan.name)):
                code, text = client.ask(command, PROBE_REPLY_S)
                found[key], found["takes_mail"] = reply_text(code, text), code // 100 == 2 and key == "rcpt"
                if code // 100 != 2:
                    break
            with contextlib.suppress(PeerError, OSError):       # everything of interest was said before
                client.ask("QUIT", PROBE_REPLY_S)
    except (PeerError, OSError, ValueError) as error:
        found["error"] = describe(error)


# -- --check

Finding = Tuple[str, str, str]          # ok, warning or error; what it is about; text
SYSLOG_SOCKETS = ("/dev/log", "/var/run/syslog")        # of Linux, of macOS


def check(cfg: Config, given: argparse.Namespace) -> int:
    """Look at configuration, spool, ports, certificate and DNS; say what is wrong.  Nothing is changed."""
    level = "ok" if cfg.domains else "warning"
    found: List[Finding] = [(level, "config", "%s: %s" % (cfg.file, plural(len(cfg.domains), "domain")))]
    names = [name for name in cfg.domains if name[0] != "."]
    server, plans = know_all(cfg, names)
    for part in (check_config, check_spool, check_ports):
        try:
            found.extend(part(server))
        except (OSError, ValueError) as error:
            found.append(("error", part.__name__[6:], describe(error)))
    calls: List[Callable[[], List[Finding]]] = [functools.partial(check_domain, cfg, plan) for plan in plans]
    calls.append(lambda: [("ok", "hostname", ", ".join(server.resolver.addresses(cfg.hostname)))])
    for name, result in zip([*names, "hostname"], in_time(server, CHECK_S, calls)):
        found += [("warning", name, str(result))] if isinstance(result, Exception) else result
    print_answer(given, [dict(zip(("level", "what", "text"), one)) for one in found], lambda: "\n".join(
        "%-8s %s: %s" % (level, what, printable(text)) for level, what, text in found))
    return EX_CONFIG if any(level == "error" for level, _, _ in found) else EX_OK


def check_config(server: Server) -> Iterator[Finding]:
    cfg = server.cfg
    server.load_certificate(cfg)        # or an error for check() to tell
    if cfg.status_listen and not cfg.status_token and not parse_address(cfg.status_listen.host).is_loopback:
        yield "warning", "config", "whoever reaches %s reads the page: set a token" % str(cfg.status_listen)
    hidden = (cfg.status_token, cfg.bounces_password,
              *itertools.chain(*((one.password, one.token) for one in cfg.domains.values())))
    for path in sorted({one[5:] if one.startswith("file:") else cfg.file for one in hidden if one}):
        if os.path.exists(path) and os.stat(path).st_mode & 0o004:
            owner = "chown %s, " % cfg.user if cfg.user else ""
            text = "%s holds a secret, and everybody may read it: %schmod 0400" % (path, owner)
            yield "warning", "config", text
    mail = cfg.alerts_mail.rpartition("@")[2]
    if cfg.domain(mail) is not None and not isinstance(cfg.alerts_mail_route, Endpoint):
        yield "warning", "alerts", "%s is served here: an alert would wait for the primary" % mail
    if cfg.log == "syslog" and not any(map(os.path.exists, SYSLOG_SOCKETS)):
        yield "warning", "log", "log = syslog, but nobody listens at %s" % SYSLOG_SOCKETS[0]


def check_spool(server: Server) -> Iterator[Finding]:
    """As the relay's account sees it: as that it opens spool, log, lists and passwords."""
    cfg = server.cfg
    folder, account, who = cfg.spool, Account(cfg.user), cfg.user or "this account"
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    is_new, kind, free = folder != cfg.spool, file_system(folder), shutil.disk_usage(folder).free
    if is_new and os.path.lexists(cfg.spool):
        yield "error", "spool", "%s is not a directory" % cfg.spool
    if is_new and cfg.user and not cfg.spool.startswith("/var/lib/"):
        yield "warning", "spool", "%s is not there, and systemd does not make it" % cfg.spool
    if kind in ("overlay", "tmpfs"):
        yield "warning", "spool", "%s is on %s: gone with its container or a power cut" % (cfg.spool, kind)
    text = "%s: %s free, refuses below %s" % (cfg.spool, format_size(free), format_size(cfg.min_free_space))
    yield "error" if free < max(1, cfg.min_free_space) else "ok", "spool", text
    with account.acting():
        paths = [] if is_new and account.name else [folder]     # root makes a new spool
        parts = [os.path.join(cfg.spool, name) for name in ("lock", "incoming", "corrupt")]
        paths += filter(os.path.exists, parts)
        if cfg.log not in ("stderr", "syslog"):
            paths.append(cfg.log if os.path.isfile(cfg.log) else os.path.dirname(cfg.log))
        for path in paths:
            if not may_use(path, os.W_OK):
                yield "error", "spool", "%s cannot write %s" % (who, path)
        if not may_use(cfg.file, os.R_OK):
            yield "error", "config", "%s cannot read %s" % (who, cfg.file)
        for path in filter(None, (cfg.tls_certificate, cfg.tls_key)):
            if not may_use(path, os.R_OK):
                yield "warning", "config", "%s cannot read %s when it is renewed" % (who, path)
        for file in server.read_files(cfg)[0].values():         # or an error for check() to tell
            if file.level == "warning":
                yield "warning", "config", file.remark


def file_system(folder: str) -> str:
    """The type of the file system a folder is on, where /proc tells; proc(5)."""
    device = os.stat(folder).st_dev
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", errors="replace") as lines:
        for words in map(str.split, lines):
            if words[2] == "%d:%d" % (os.major(device), os.minor(device)):
                return words[words.index("-") + 1]
    return ""


def check_ports(server: Server) -> Iterator[Finding]:
    cfg = server.cfg
    wanted = [*cfg.listen, *cfg.odmr_listen, *filter(None, [cfg.status_listen])]
    with contextlib.ExitStack() as stack:       # all at once: one may be in the way of another
        for where in () if is_running(cfg) else wanted:
            try:
                stack.enter_context(bind(where, 1))
            except OSError as error:
                level = "warning" if is_spare(where, wanted, error) else "error"
                yield level, "port", describe(error)


def check_domain(cfg: Config, plan: Plan) -> List[Finding]:
    """Its MX records must name this host, and a better one.  Its primary must be found, and should answer."""
    out: List[Finding] = []
    try:
        records: List[Tuple[int, str]] = sorted(plan.resolver.query(plan.name, MX))
        text = "MX: " + ", ".join("%d %s" % record for record in records)
        if not any(host == cfg.hostname and preference > records[0][0] for preference, host in records):
            text += "; %s should be among them, behind a better host" % cfg.hostname
        out.append(("warning" if ";" in text else "ok", plan.name, text))
    except DnsError as error:
        out.append(("warning", plan.name, str(error)))
    if plan.primary in WAITS:
        may_come = cfg.odmr_listen if plan.primary == "atrn" else plan.cfg.etrn != "none"
        text = "mail %s; that needs username, and odmr_listen or etrn" % WAITS[str(plan.primary)]
        return [*out, ("ok" if may_come and plan.cfg.username else "error", plan.name, text)]
    client, problem, hops, warning = dial(plan)
    if client is not None:
        client.close()
    level = "error" if not hops else "warning" if problem or warning else "ok"
    text = "primary: %s; %s" % (", ".join(map(str, hops)) or "none", warning or problem or "it answers")
    return [*out, (level, plan.name, text)]


# -- --demo

DEMO_CONFIG = """\
[relay]
hostname = %(name)s.example.net
listen = 127.0.0.1:%(port)d
spool = %(name)s
log = %(name)s.log
[domain example.com]
primary = %(primary)s
"""


def start_demo(stack: contextlib.ExitStack, folder: str, **values: Any) -> Config:
    file = os.path.join(folder, values["name"] + ".conf")
    with open(file, "w", encoding="ascii") as stream:
        stream.write(DEMO_CONFIG % values)
    relay = stack.enter_context(subprocess.Popen([sys.executable, SCRIPT, "--config", file]))
    stack.callback(relay.wait)
    stack.callback(relay.terminate)
    cfg = read_config(file)
    while relay.poll() is None and not is_running(cfg):
        time.sleep(DEMO_POLL_S)
    return cfg


def play_demo() -> int:
    """An outage with real SMTP on loopback, in a temporary folder.  Another relay plays the primary."""
    for ending in (signal.SIGHUP, signal.SIGTERM):      # no relay outlives us
        signal.signal(ending, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="etrn-demo-") as folder, contextlib.ExitStack() as stack:
        with bind(Endpoint("127.0.0.1", 0), 1) as one, bind(Endpoint("127.0.0.1", 0), 1) as other:
            port, away = one.getsockname()[1], other.getsockname()[1]
        cfg = start_demo(stack, folder, name="backup", port=port, primary="127.0.0.1:%d" % away)
        print("A backup MX for example.com is up on 127.0.0.1:%d.  The primary is down." % port)
        with smtplib.SMTP("127.0.0.1", port, "sender.example.org") as client:
            for number in range(5):
                client.sendmail("sender%d@example.org" % number, "user@example.com", "Subject: hi\n\n")
        print("Five messages came in, and are safe on disk.  --queue shows:\n")
        print(format_queue(read_rows(cfg, "all"), time.time()))
        primary = start_demo(stack, folder, name="mail", port=away, primary="atrn")
        print("The primary is back.  The relay would find out, but it asks for its mail:")
        with smtplib.SMTP("127.0.0.1", port, "mail.example.com") as client:
            client.ehlo()
            code, text = client.docmd("ETRN", "example.com")
        print("ETRN example.com\n%d %s" % (code, text.decode("ascii")))
        end = time.monotonic() + DEMO_WAIT_S
        while read_rows(cfg, "all") and time.monotonic() < end:
            time.sleep(DEMO_POLL_S)
        is_well = len(read_rows(primary, "all")) == 5
    print("The primary has them all.  Nothing was lost." if is_well else "Mail is still waiting.")
    return EX_OK if is_well else EX_TEMPFAIL


# -- the command line

WHAT = {"type": parse_what}
COMMAND_LINE: Dict[str, Tuple[Callable[[Config, argparse.Namespace], int], Dict[str, Any], str]] = {
    # --name: (what does it, its argument as argparse has it, the options that go with it)
    "check": (check, {"action": "store_true"}, "json"),
    "status": (show_status, {"action": "store_true"}, "json"),
    "queue": (show_queue, {"type": parse_what, "nargs": "?", "const": "all"}, "json"),
    "show": (show_message, {"type": str.upper}, "json raw"),
    "probe": (probe, WHAT, "json"),
    "export": (export, WHAT, ""),
    "flush": (flush, WHAT, "json no_wait"),
    "hold": (change_queue, WHAT, ""),
    "release": (change_queue, WHAT, ""),
    "delete": (change_queue, WHAT, "yes"),
    "bounce": (change_queue, WHAT, "yes"),
}


# -- --print-unit

SCRIPT = os.path.abspath(__file__)     # Python forgets it before run_main() begins
UNITS = {"systemd": """\
# etrn_relay.service, for /etc/systemd/system.  Then:
#   systemctl daemon-reload && systemctl enable --now etrn_relay
[Unit]
Description=etrn_relay, a backup mail exchanger
Wants=network-online.target
After=network-online.target nss-lookup.target
RequiresMountsFor=%(folders)s

[Service]
Type=notify
ExecStart=%(systemd)s
ExecReload=/bin/sh -c "kill -HUP ${MAINPID}"
WatchdogSec=60
Restart=on-failure
RestartSec=5
RestartPreventExitStatus=78 64
LimitNOFILE=%(files)d
%(account)s
StateDirectory=%(state)s
StateDirectoryMode=0700
ReadWritePaths=%(folders)s
CapabilityBoundingSet=CAP_NET_BIND_SERVICE
AmbientCapabilities=CAP_NET_BIND_SERVICE
UMask=0077
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
%(hardening)s
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
""", "openrc": """\
#!/sbin/openrc-run
# /etc/init.d/etrn_relay, executable.  Then:  rc-update add etrn_relay && rc-service etrn_relay start
supervisor=supervise-daemon
command=%(program)s
command_args=%(arguments)s
umask=077
respawn_max=0
rc_ulimit="-n %(files)d"
error_log=/var/log/etrn_relay.log
extra_started_commands=reload
depend() { need net localmount; use dns logger; }
reload() { supervise-daemon "$RC_SVCNAME" --signal HUP; }
""", "procd": """\
#!/bin/sh /etc/rc.common
# /etc/init.d/etrn_relay, executable.  Then:  service etrn_relay enable && service etrn_relay start
USE_PROCD=1
START=95
start_service() {
	procd_open_instance
	procd_set_param command %(shell)s
	procd_set_param respawn 3600 5 0
	procd_set_param limits nofile="%(files)d %(files)d"
	procd_set_param reload_signal HUP
	procd_set_param stderr 1
	procd_close_instance
}
""", "launchd": """\
<?xml version="1.0" encoding="UTF-8"?>
<!-- /Library/LaunchDaemons/etrn_relay.plist.  Then: launchctl bootstrap system that file -->
<plist version="1.0"><dict>
<key>Label</key><string>etrn_relay</string>
<key>ProgramArguments</key><array>%(strings)s</array>
<key>KeepAlive</key><dict><key>SuccessfulExit</key><false/></dict>
<key>StandardErrorPath</key><string>/var/log/etrn_relay.log</string>
</dict></plist>
"""}
HARDENING = ("NoNewPrivileges", "PrivateDevices", "ProtectControlGroups", "ProtectKernelTunables",
             "RestrictNamespaces", "RestrictSUIDSGID", "LockPersonality", "MemoryDenyWriteExecute")


def format_unit(kind: str, config: str) -> str:
    """From the configuration, or as it would be without one.  Raises ConfigError and Failure."""
    config = os.path.abspath(config)
    try:
        cfg = read_config(config)
    except OSError as error:
        # On a router (procd) /var is in memory.
        spool = "/mnt/usb/etrn_relay" if kind == "procd" else "/var/lib/etrn_relay"
        cfg = parse_config("[relay]\nspool = %s\n" % spool, config)
        print("%s: %s.  Set  spool = %s  in it." % (config, error.strerror, spool), file=sys.stderr)
    words = [sys.executable or "/usr/bin/python3", SCRIPT, "--config", config]
    for path in (*words, cfg.spool, cfg.log):
        if not path.isprintable():
            raise Failure("%r cannot be written in a unit: give it another name" % path, EX_USAGE)
    # The service manager makes a spool below /var/lib, if no colon is in it: that means something in
    # StateDirectory.  It makes none elsewhere: that would be on the wrong disk while its own is not mounted.
    is_state = cfg.spool.startswith("/var/lib/") and ":" not in cfg.spool
    folders = [] if is_state else [cfg.spool]
    folders += [os.path.dirname(cfg.log)] if cfg.log.startswith("/") else []
    return UNITS[kind] % {
        "files": max(65536, 3 * cfg.max_connections), "folders": " ".join(map(quote_systemd, folders)),
        "account": "User=" + cfg.user if cfg.user else "DynamicUser=yes" if is_state else "User=root",
        "state": quote_systemd(os.path.relpath(cfg.spool, "/var/lib")) if is_state else "",
        "systemd": " ".join(quote_systemd(word).replace("$", "$$") for word in words),
        "shell": " ".join(map(shlex.quote, words)), "program": shlex.quote(shlex.quote(words[0])),
        "arguments": shlex.quote(" ".join(map(shlex.quote, words[1:]))),    # OpenRC evaluates it once more
        "strings": "".join("<string>%s</string>" % html.escape(word, False) for word in words),
        "hardening": "\n".join(word + "=yes" for word in HARDENING)}


def quote_systemd(text: str) -> str:
    """A word of systemd.unit(5), where % starts a specifier."""
    text = text.replace("%", "%%")
    is_plain = re.fullmatch(r"[\w/.:@+=,%$-]+", text)
    return text if is_plain else '"%s"' % text.replace("\\", "\\\\").replace('"', '\\"')


def hold_standard_files() -> None:
    """What was closed by who started us (`>&-`, rc.local, cron) becomes /dev/null: else the next file
    or socket would have its number, and be written to."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))      # takes the lowest number that is free


def run_main() -> None:
    """Ends the process: what it runs in has no other way to tell the exit status."""
    status = 1
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # who started us may ignore it: no end is told then
    try:
        status = main()
    except BaseException:
        traceback.print_exc()
    for file in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            file.flush()
    os._exit(status)


if __name__ == "__main__":
    hold_standard_files()
    # CPython keeps the syntax tree of its main script until that has ended: 15 MB, half of what the
    # relay needs.  So the script ends, and the relay runs in what is called then.  3.12 allows no
    # threads there, 3.8 keeps no tree.
    at_end = getattr(threading, "_register_atexit", None) if sys.version_info[:2] != (3, 12) else None
    (at_end or (lambda call: call()))(run_main)
