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
    A secondary MX takes mail while the primary is away.  Each message is a
    pair in the spool directory: ID.eml is the message as it will be sent,
    with our Received field and CRLF line ends; ID.json, its sidecar, holds the
    envelope, the state of every recipient, the expiry and the SHA-256 of the
    .eml.  Both are plain files for ls, cat and jq.  A pair copied to the spool
    of another relay is delivered from there after its next start or SIGHUP;
    at SIGHUP one that is still being copied is waited for.

    After the 250 that answers the end of the data, message, envelope and
    directory entries are on stable storage.  A message leaves the spool only by
    the primary's own 250, by its sender having been told, or by an
    operator's command.  Crashes may cause a second copy, never a loss.

    While mail waits for a primary that is down, the primary is tried every
    probe_interval at the longest, and every second at first; when it greets,
    everything queued for it goes, oldest first.  After an outage one message goes
    alone; when it is taken, connections are added one by one, up to
    `connections`, or two for a primary that answers within 3 ms.

    A primary is unknown, up, down or rejecting.  For recovery_grace after an
    outage no 5xx is believed: the message is kept and tried again, and a second
    5xx so long after the first is final.  Three messages refused in a row in
    that time, or three recipients at any time that the primary took before,
    make it rejecting: one message is tried every probe_interval, each in its
    turn, nothing is returned, and what it says of recipients is forgotten,
    until it takes one, or --flush says that it is itself again.  What it said
    of messages before counts no more then; when it heals by itself, only if
    that was not so within a day.

    A route found through MX never leads to this host, to hosts of the same
    preference, or beyond: any number of relays may share one.  When the DNS
    fails, the route that worked last is used for `lifetime`.

ETRN
    RFC 1985.  `ETRN example.org` probes that domain's primary at once and
    delivers everything but held mail; `ETRN @example.org` takes in the
    subdomains.  Mail goes to the domain's own primary and nowhere else,
    whoever asks.  Each reply is one line, and 251 is never sent, because
    fetchmail stops at it.  --flush DOMAIN does the same.

    A domain with a username may be asked for by AUTH too: CRAM-MD5, and PLAIN
    within TLS.  Who authenticated may flush the domains of that username, learns
    how much waits, and may do nothing else.  Networks in `etrn` are for those
    who come without: an authenticated client may come from anywhere, unless
    etrn = none.  With primary = etrn the mail goes to port 25 of the address the
    last authenticated ETRN came from, for primaries whose address changes.

ODMR
    RFC 2645, for primaries that nobody can connect to: behind NAT, or where
    port 25 is blocked.  With primary = atrn mail waits to be collected; nothing is
    probed.  The customer's server, or fetchmail, connects to a port of
    odmr_listen, authenticates, and says `ATRN example.org,example.net`, or ATRN
    for all domains of its username.  After `250 OK now reversing the
    connection` it is the SMTP server, on the connection it made, and the mail
    goes to it like to any primary: no canary, for who comes is there.
        poll backup.example.net service 366 protocol ODMR auth cram-md5
            username "gw" password "secret" fetchdomains example.org
            smtphost 127.0.0.1
    450: not a domain of that username.  451: not now, or somebody is collecting
    already.  453: no mail.  530: AUTH first, or STARTTLS where the tls option of
    a domain asks for it.  A domain with another primary may be collected, too.

    Mail that nobody collects expires after its lifetime like any other, but
    never by a jump of the clock alone, nor in a relay's first three hours.

STATUS PAGE
    [status] listen = 127.0.0.1:8025 serves, over HTTP and read-only:
    /             for people: each primary's state, what waits and why, a day and
                  a week of both as lines, recent events, disk, certificate
    /metrics      for Prometheus; every name begins with etrn_relay_
    /status.json  what --status --json prints
    /healthz      200 "ok", or 503 and the reason: the spool is sick, the disk
                  is short, the loop is stalled.  A primary that is down is none
    With [status] token set, all but /healthz ask for it: as
    `Authorization: Bearer TOKEN`, or as the password of any user name.  There is
    no TLS here: from elsewhere, go through ssh -L or a web server's proxy.

SIGNALS
    HUP   read the configuration again, reopen the log, look for copied mail
    USR1  probe every primary and deliver what can be delivered
    TERM, INT   stop within 5 seconds; nothing is lost
    They are for the relay.  The second process one sees is its clerk, which
    writes small messages to the spool, ignores them and ends with the relay.

SERVICES
    --print-unit prints a unit with the paths of this script, of its Python and
    of the configuration; its first lines say where it belongs.  Under systemd
    the relay says when it is ready, reloading and stopping, and feeds the
    watchdog from its loop (sd_notify(3)).  Listening sockets that are passed
    (LISTEN_FDS, sd_listen_fds(3)) serve as the addresses of `listen` and
    `odmr_listen` that they have; when they have none of them, all serve SMTP
    and `listen` is not bound.  So port 25 needs no root.  SIGHUP keeps them.

ALERTS
    [alerts] command, webhook and mail are told of: down, a primary has been
    away for `after`; up again; rejecting; expiring, mail has a day left, or half
    its lifetime where that is less; disk, less than twice min_free_space is
    left; certificate, it expires within 14 days.  The last three come once a
    day, and stand in the log as warnings.  The command finds ETRN_EVENT,
    ETRN_DOMAIN, ETRN_TEXT, ETRN_HOST, ETRN_TIME and ETRN_WAITING in its
    environment and the same as JSON on its input.

FILES
    SPOOL/ID.eml, SPOOL/ID.json     a queued message and its sidecar
    SPOOL/incoming/                 being received; never acknowledged
    SPOOL/done/                     delivered; emptied files, to be used again
    SPOOL/corrupt/                  pairs that could not be trusted
    SPOOL/state.json                what is known of the primaries, and where
                                    they are (primary = etrn); counters
    SPOOL/recipients.json           which recipients the primaries take
    SPOOL/history.json              what the status page draws; a week at most
    SPOOL/control, SPOOL/lock       how commands reach the running relay

LOG LINES
    Postfix's grammar; one line an event, queue ID or NOQUEUE first.  These are
    the kinds that tell what became of mail and of primaries:
    smtpd: ID: client=NAME[ADDRESS]
    qmgr: ID: from=<ADDRESS>, size=N, nrcpt=N (queue active)
    smtp: ID: to=<ADDRESS>, relay=HOST[ADDRESS]:PORT, delay=S, delays=A/B/C/D,
          dsn=X.Y.Z, status=sent|deferred|bounced|expired (WHY)
    qmgr: ID: removed
    bounce: ID: sender non-delivery notification: NEW-ID
    smtpd: NOQUEUE: reject: RCPT from NAME[ADDRESS]: REPLY; from=<> to=<> ...
          (also CONNECT, PREGREET, MAIL, END-OF-MESSAGE, STARTTLS, GET ...)
    smtpd: timeout after STAGE from NAME[ADDRESS]
    smtpd: too many errors after STAGE from NAME[ADDRESS]
    smtpd: TLS handshake failed from NAME[ADDRESS]: WHY
    smtpd: warning: NAME[ADDRESS]: SASL MECHANISM authentication failed: ...
    smtpd: NAME[ADDRESS]: sasl_method=MECHANISM, sasl_username=NAME
    flush: etrn: site=DOMAIN, client=NAME[ADDRESS], messages=N, reply=CODE
    flush: atrn: site=DOMAIN,..., client=NAME[ADDRESS], messages=N, reply=CODE
    primary: DOMAIN: at ADDRESS since an authenticated ETRN
    flush: command: site=DOMAIN, messages=N
    qmgr: ID|DOMAIN|all: held|released by command, N messages
    qmgr: ID: deleted|bounced by command
    primary: DOMAIN: up, N messages waiting
    primary: DOMAIN: up after 2h14m, 1841 messages waiting
    primary: DOMAIN: down: WHY, N messages waiting
    primary: warning: DOMAIN: rejecting: REPLY, N messages waiting
    primary: DOMAIN: up after rejecting for 10m, N messages waiting
    http: refused: GET PATH from NAME[ADDRESS]: 401 wrong token
    master: started: ..., configuration reread, stopping, stopped, and what is
          wrong with the machine.  `warning: ` or `error: ` comes before the text
          of whatever is.
    `log = syslog` has the same lines, tagged etrn_relay/SERVICE[PID], in the
    mail facility.  Other programs read them:
        pflogsumm --syslog-name etrn_relay FILE
        fail2ban-regex FILE 'postfix[_daemon=etrn_relay/smtpd]'
    (pflogsumm spoils the underscore of --syslog-name=etrn_relay.)

EXIT STATUS
    0 done; 1 something asked about is missing; 64 usage; 69 the relay or the
    primary cannot be reached; 75 temporary: mail is still waiting, the primary
    answers a --probe but would not take mail now, another relay holds the spool,
    or another program an address to listen on; 78 configuration.

BUGS
    A disk that says "written" before it is cannot be noticed.  A message whose
    connection to the primary broke between the end of its data and the answer
    arrives twice if it was taken: one for each connection, and up to 16 with
    CHUNKING, where whole messages are sent ahead of the answers.  When the relay is
    killed, what the primary has taken and the disk has not recorded goes again.
    Mail that came while the clock was wrong has its true age until a restart.

CONTENTS
    1 MANUAL  2 LIMITS  3 GRAMMAR  4 CONFIG  5 LOG  6 SPOOL  7 SESSION
    8 SCHEDULE  9 DNS  10 DSN  11 DELIVERY  12 QUEUE  13 CONTROL  14 STATUS
    15 SERVER  16 MAIN.  Search for "== 6" and you are at the spool.
"""
# == 1. MANUAL =================================================================
# The text above.  `--help` prints its first part, up to QUEUE.

from __future__ import annotations

import argparse
import base64
import bisect
import calendar
import collections
import configparser
import contextlib
import dataclasses
import difflib
import email.utils
import enum
import errno
import fcntl
import functools
import gc
import hashlib
import heapq
import hmac
import io
import ipaddress
import itertools
import json
import marshal
import operator
import os
import pwd
import queue
import random
import re
import resource
import secrets
import select
import selectors
import shlex
import shutil
import signal
import smtplib
import socket
import socketserver
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import urllib.request
from typing import (Any, Callable, Deque, Dict, FrozenSet, Iterable, Iterator, List, Mapping, MutableMapping, NamedTuple,
                    Optional, Sequence, Set, TextIO, Tuple, Type, Union)

try:                            # slim routers leave some modules out; what needs them is refused there, the rest works
    import syslog
except ImportError:
    syslog = None               # type: ignore[assignment]
try:
    import ssl
except ImportError:
    ssl = None                  # type: ignore[assignment]
try:
    import http.server
except ImportError:
    http = None                 # type: ignore[assignment]
try:
    import ctypes
except (ImportError, MemoryError):      # the latter where no memory may be made executable
    ctypes = None               # type: ignore[assignment]

__version__ = "0.1"

# == 2. LIMITS =================================================================
# Every number that is not an option, with its unit and its reason.

# -- what a client may send
COMMAND_MAX = 2048              # octets with line end; RFC 5321 4.5.3.1.4 wants 512, long paths and parameters need more
LOCAL_MAX = 64                  # octets, RFC 5321 4.5.3.1.1
DOMAIN_MAX = 253                # octets of a name as text; RFC 5321 4.5.3.1.2 says 255 with the dots DNS counts
PATH_MAX = 256                  # octets with the angle brackets, RFC 5321 4.5.3.1.3
ERRORS_MAX = 10                 # protocol errors in a session; the next one is answered 421
HOPS_MAX = 100                  # Received fields, RFC 5321 6.3: "SHOULD use a large rejection threshold, normally at least 100"
OWN_HOPS_MAX = 3                # our own name in them: mail that comes back is in a loop long before a hundred hops
HEADER_FIELD_KEPT = 2000        # octets of one field looked at; `by` stands near its front
HEADER_SCAN_MAX = 262144        # octets of header searched for Received fields; hops are added at the top
ENVID_MAX = 100                 # octets, RFC 3461 4.4
ORCPT_MAX = 500                 # octets, RFC 3461 4.2
LOGIN_MAX = 255                 # octets of a name or a password, RFC 4616 2
LOGINS_FAILED_MAX = 3           # failed AUTHs in a session; with the last one it ends
OVERSIZE_FACTOR = 2             # a client that sends more than this times the limit is cut off, not read to the end

# -- the loop
RECEIVE_OCTETS = 65536          # read from one client at a time, so that no client holds the others up
COMMAND_OCTETS = 4096           # ... while it sends commands: some hundreds of them, a few milliseconds' work
OUTPUT_MAX = 65536              # octets of replies a client may leave unread before we stop reading from it
SPILL_OCTETS = 131072           # of a body in memory before it is handed to a committer
UNWRITTEN_MAX = 524288          # octets of one body in memory, then the client waits for the disk
UNWRITTEN_TOTAL = 33554432      # ... and of all bodies: many clients have smaller shares, so that a small machine lives
UNWRITTEN_LEAST = 16384         # ... but no smaller than this
LISTEN_BACKLOG = 512            # connections the kernel may keep for us between two turns
HANDSHAKE_S = 30.0              # for a client's side of a TLS handshake
LOGIN_FAILED_S = 1.0            # a failed AUTH is answered so late; guessing gets slow, a typing error costs nothing
LINGER_S = 2.0                  # for a client to read our last reply before the connection is reset
STRESS_SHARE = 0.8              # of max_connections in use ...
STRESS_TIMEOUT_S = 10.0         # ... and idle clients are given so long; Postfix's stress mode
COMMAND_POLL_S = 0.1            # a waiting command looks again so often
ACCEPTS_PER_TURN = 64           # new connections taken before those already open are looked at again
ACCEPT_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)      # after these the client is still waiting
SWEEP_S = 1.0                   # how often idle clients are looked for; idle limits are minutes
NOTIFY_S = 1.0                  # a service manager has so long to take our word that we are ready
STOP_S = 3.0                    # time given to sessions and deliveries at SIGTERM; contract: stopped within 5 s
STOP_DISK_S = 1.0               # ... and after that to a disk that does nothing, and half of it again
STOP_POLL_S = 0.1               # ... which is looked at so often
RESERVED_FILES = 64             # descriptors kept from clients for spool, workers, logs and DNS
DATA_RATE_MIN = 500             # octets a second a client must reach in the long run, as Postfix's smtpd_min_data_rate

# -- the spool
COMMITTERS_MAX = 48             # batches under way at once where an fsync takes tens of milliseconds and must overlap
FAST_FSYNC_S = 0.0005           # one batch more for each such time that an fsync takes
SPARES_MAX = 8192               # empty files kept for the next messages; a big outage makes and frees no more than it needs
CLERK_OCTETS = 65536            # of a body that is handed to the clerk; a larger one is not worth the copy
LOCK_WAIT_S = 5.0               # for the clerk of a relay that was killed to end ...
LOCK_POLL_S = 0.01              # ... which takes it a moment
BATCH_MAX = 64                  # messages a committer makes durable together
BLOCK_OCTETS = 262144           # read or written at once where a file does not fit in memory
ORPHAN_S = 3600.0               # a lone .eml younger than this may be half of a pair being copied
COPY_S = 5.0                    # a pair that makes no sense is left alone until it has not changed for so long
RETRY_READ_S = 300.0            # longest pause between attempts to read what the disk does not give
TIME_MAX = 253402300800.0       # seconds; dates of the year 10000 cannot be written (RFC 5322 3.3)
RETRY_DISK_S = 5.0              # between attempts to record what a full or failing disk did not take
PEEK_OCTETS = 16384             # most sidecars are far smaller
SIDECAR_MAX = 8 << 20           # octets; a thousand recipients with long answers are far below
STATE_MAX = 256 << 20           # octets; RECIPIENTS_MAX of the longest addresses are a tenth of it
FLUSH_LOOK_S = 1.0              # a --flush that waits looks so often for what was held meanwhile
END_BATCH = 500                 # messages a command deletes or returns in one turn of the loop
LOAD_BATCH = 200                # messages handed from the loader to the loop at a time
STATE_SAVE_S = 60.0             # counters and primaries are saved so often when they changed
SPACE_CHECK_S = 1.0             # free space is asked of the file system at most so often

# -- towards the primary
SMTP_PORT = 25                  # of hosts found through MX, RFC 5321 4.5.4.2
ODMR_PORT = 366                 # of on-demand mail relay, RFC 2645 5
CONNECT_S = 30.0                # contract 5, and the four below; RFC 5321 4.5.3.2 asks no less than 2 min for DATA,
COMMAND_S = 300.0               # 5 min for commands
DATA_S = 120.0
BLOCK_S = 180.0
END_OF_DATA_S = 600.0           # short waits here make duplicates, RFC 1047
XCLIENT_VALUE_MAX = 255         # characters of a client's HELO; Postfix takes lines of 512 with all attributes
QUIT_S = 2.0                    # for the answer to QUIT, which says nothing any more
REPLY_LINES_MAX = 100           # of one reply; an EHLO answer has about a dozen
REPLY_OCTETS_MAX = 65536
RCPTS_PER_TRANSACTION = 100     # what every server must take, RFC 5321 4.5.3.1.8
JOBS_PER_CONNECTION = 32        # messages handed to a connection at a time, so that others get their share
JOBS_REFILL = 24                # a connection with so few left gets more: more than may be in flight, so that it never runs dry
JOBS_LOW = 8                    # ... and with so few not begun it wakes the loop for them
GATHER_S = 0.02                 # while messages are taken in a row the loop looks so often, and is not woken for each ...
GATHERING_S = 1.0               # ... until so long after the last
UNRECORDED_MAX = 200            # outcomes that the disk has not taken; then no more is given out, so that a kill repeats little
CHUNK_MESSAGES = 16             # whole messages in flight on a connection with CHUNKING; when it breaks all of them are in doubt
CHUNK_OCTETS = 262144           # ... and no further one is sent behind so many octets
CHUNK_RECIPIENTS = 200          # ... nor behind so many recipients, whose replies nobody reads meanwhile: RFC 2920 3.1
IDLE_CONNECTION_S = 2.0         # a connection waits so long for another message before QUIT
PROBE_FIRST_S = 1.0             # pause after the first failures; doubles to probe_interval ...
QUICK_PROBES = 60               # ... each time after so many: a minute at 1 s, two at 2 s, four at 4 s; most outages are reboots
TRIGGER_S = 1.0                 # a flood of ETRNs costs one probe a second
QUICK_PACE_S = 0.003            # a primary that answers each message within so long gets no more ...
QUICK_CONNECTIONS = 2           # ... than so many connections: further threads would only wait for each other
SLOW_PACE_S = 0.1               # longer waits count as this
MESSAGES_PER_CONNECTION = 20    # so many waiting messages justify one connection more to such a primary
NOTICE_CONNECTIONS = 2          # to a smarthost or a sender's server
NOTICE_LIFETIME_S = 432000.0    # 5 days at least, as Postfix keeps bounces, however short `lifetime` is
NOTICE_PROBE_S = 300.0          # longest pause between attempts to reach one of those
VERDICTS = 20                   # the last answers looked at: mostly 4xx halves the connections
ALERT_S = 30.0                  # for an alert's command or web hook
ALERT_EXPIRY_S = 86400.0        # so long before mail expires its operator is told
REFUSED_ROW = 3                 # messages refused in a row that make a returned primary `rejecting`; contract 5
CANARIES_DEFERRED = 3           # 4xx to so many canaries in a row is greylisting: the rest goes by one connection
ATRN_SILENT_S = 60.0            # who collects is taken for gone when silent for so long and somebody else comes
PART_S = 5.0                    # for answers of a primary that asked for its mail from elsewhere meanwhile
PARDON_S = 86400.0              # so often a primary that ceases to be `rejecting` by itself begins anew
EARLY_PAUSES_S = (60.0, 300.0)  # after the first and the second 4xx or kept 5xx of a returned primary
STAGGER_S = 0.25                # before a host's next address is tried beside one that does not answer, RFC 8305 5
HOST_STAGGER_S = 4.0            # ... and before the next host is, which may be far away but is there
ATTEMPTS_MIN = 3                # failed attempts that must stand behind an expiry; a jump of the clock is none
UNCOLLECTED_S = 10800.0         # ... or, where nothing can be tried, so long a time in which nobody came for the mail
CLOCK_JUMP_S = 60.0             # wall and monotonic clock drifting apart by more at once is a jump

CUT_THROUGH_S = 30.0            # a client waits so long at most for the primary's own verdict; contract 5
CALL_AHEAD_S = 5.0              # a client waits so long at most for the primary's word on a recipient
INQUIRERS_MAX = 4               # connections for such questions to one primary
LINES_MAX = 100                 # connections to all primaries together, each a thread; and as many for questions
LINES_RESERVED = 25             # of these, for the first connection to a primary that is not known to be down
NOTICE_LINES_MAX = 20           # of these, to senders' servers, which are many, far and often dead
QUESTIONS_PER_INQUIRER = 4      # so many unanswered ones justify another connection
INQUIRER_IDLE_S = 10.0          # such a connection waits so long for another question
GOOD_S = 31 * 86400.0           # a recipient the primary took is known so long; contract 5
BAD_S = 3 * 86400.0
ACCEPT_ALL_S = 86400.0          # a primary that takes any local part is not asked for a day
SLACK_S = 86400.0               # so far may the clock be set back, and what was learnt before still holds
RECIPIENTS_MAX = 50000          # remembered; when there are more, the bad and the oldest go first
KNOWN_UP_S = 60.0               # word from the primary within so long means that it is up
PERSISTENCE_S = 300.0           # while_up = defer: the third try so long after the first is taken
PERSISTENCE_TRIES = 3
PERSISTENCE_MAX = 50000         # clients, senders and recipients remembered for that, a day long
FILE_CHECK_S = 1.0              # how often a file of recipients is looked at for changes

# -- names
DNS_TRY_S = 3.0                 # for one answer from one server, then the next server is asked
DNS_TOTAL_S = 20.0              # for one question
DNS_UDP_MAX = 1232              # octets in EDNS; fits in an unfragmented IPv6 packet
DNS_CNAMES_MAX = 10
DNS_RECORDS_MAX = 100           # looked at in one answer
ROUTE_HOSTS_MAX = 20            # addresses tried for one primary

# -- --probe and --check
PROBE_ROUTE_S = 12.0            # for all questions to the DNS; with the next, a probe takes half a minute at most
PROBE_HOSTS_S = 16.0            # for all hosts, which are asked beside each other
PROBE_REPLY_S = 10.0            # for one connection or reply
CHECK_S = 25.0                  # for all of --check
CHECK_THREADS = 16              # so many domains are looked at beside each other

# -- the status page
PAGE_CONNECTIONS = 32           # at once, each a thread; more are closed unheard
PAGE_CONNECTIONS_PER_CLIENT = 16    # of one address, so that a stuck browser leaves room for the monitoring
PAGE_PACE_S = 0.01              # between two that are taken: a flood must not take the processor from the mail
PAGE_REQUEST_MAX = 16384        # octets of a request with its header; browsers send under 2,000
PAGE_TOTAL_S = 10.0             # for a whole request and its answer, however slowly either goes
PAGE_FRESH_S = 1.0              # the loop is asked for new values at most so often
PAGE_STALL_S = 5.0              # a loop that does not answer within is called stalled
PAGE_REFRESH_S = 15             # how often the page reloads itself
PAGE_DOMAINS_MAX = 100          # shown with all there is; those in trouble come first
CERTIFICATE_WARNING_S = 14 * 86400.0    # before a certificate ends; who renews by machine does so a month before
HISTORY_BUCKET_S = 300.0        # the queue's depth is kept as the peak of each 5 minutes, for a day ...
HISTORY_COARSE_S = 3600.0       # ... and of each hour, for a week
HISTORY_STATES_MAX = 500        # changes of one primary's state kept
HISTORY_SITES_MAX = 100         # domains whose history is kept; subdomains of a wildcard come and go
HISTORY_SAVE_S = 900.0          # a changed history is written at most so often: flash wears out
EVENTS_MAX = 20                 # kept of each service
EVENT_TEXT_MAX = 240            # characters kept of one
# Upper bounds in seconds: what a client waits for a flushed disk or a cut-through, and what mail waits for a primary
ACCEPTANCE_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
QUEUE_BOUNDS = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 43200.0, 86400.0, 172800.0, 345600.0, 604800.0)

# -- texts
LOG_TEXT_MAX = 500              # characters of foreign text in one log line
RESPONSE_MAX = 400              # characters kept of a reply
REPLY_PART_MAX = 120            # characters of it within a reply of ours; RFC 5321 4.5.3.1.5 gives a line 512 octets
LINE_MAX = 990                  # octets of a line in what is returned; RFC 5322 2.1.1 allows 998
FOLD_WIDTH = 77                 # characters of a field of ours in a notice, RFC 5322 2.1.1
NOTICE_FULL_MAX = 1 << 20       # octets; a larger original is returned as headers even when RET=FULL

Time = float                    # seconds since the epoch
EX_OK, EX_MISSING, EX_USAGE, EX_UNAVAILABLE, EX_TEMPFAIL, EX_CONFIG = 0, 1, 64, 69, 75, 78


# == 3. GRAMMAR ================================================================
# Paths, domains, address literals, parameters, replies: one function a production.
# Pure.  Everything sent on is built from what these functions return, so
# what was judged is what is sent.

class Reply(NamedTuple):
    """An SMTP reply.  `text` may have several lines; `status` is the enhanced
    code of RFC 3463 or empty."""
    code: int
    status: str
    text: str

    def wire(self) -> bytes:
        return format_reply(self)

    def __str__(self) -> str:
        return " ".join(filter(None, (str(self.code), self.status, self.text.replace("\n", " "))))


@functools.lru_cache(maxsize=256)           # the same few are said again and again
def format_reply(reply: Reply) -> bytes:
    status = reply.status + " " if reply.status else ""
    lines = reply.text.split("\n")
    out = ["%d-%s%s\r\n" % (reply.code, status, line) for line in lines[:-1]]
    out.append("%d %s%s\r\n" % (reply.code, status, lines[-1]))
    return "".join(out).encode("utf-8", "replace")


class Refuse(Exception):
    """The peer's mistake: becomes `reply` on the wire, and one log line."""

    def __init__(self, code: int, status: str, text: str) -> None:
        super().__init__(text)
        self.reply = Reply(code, status, text)


CONTROLS = re.compile(rb"[\x00-\x1f\x7f]")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)
_ATEXT = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~\-\u0080-\U0010ffff]+"
_QUOTED = r'"(?:[^"\\\x00-\x1f\x7f]|\\[\x20-\x7e])*"'
_PATH = re.compile(r"<(?P<route>@[^\s<>:,]+(?:,@[^\s<>:,]+)*:)?(?:(?P<local>%s(?:\.%s)*|%s)"
                   r"@(?P<domain>\[[^\[\]<>\s]*\]|[^\s<>@\[\]]+)|(?P<bare>%s(?:\.%s)*)?)>"
                   % (_ATEXT, _ATEXT, _QUOTED, _ATEXT, _ATEXT))
_PARAMETER = re.compile(r"([A-Za-z0-9][A-Za-z0-9-]*)(?:=([^\x00-\x20=\x7f]+))?")
_XTEXT = re.compile(r"(?:[!-*,-<>-~]|\+[0-9A-F]{2})*")


@functools.lru_cache(maxsize=4096)
def parse_domain(text: str) -> str:
    """A domain name as lower-case A-labels, without a final dot (RFC 5321
    4.1.2, RFC 5890).  Raises ValueError.  Underscores pass: some senders have
    them, and no served name is reached by one."""
    if not text.isascii():
        try:
            text = text.encode("idna").decode("ascii")
        except (UnicodeError, LookupError):
            raise ValueError("not a domain name") from None
    name = text.lower()
    if not name or len(name) > DOMAIN_MAX:
        raise ValueError("not a domain name")
    labels = name.split(".")
    if not all(_LABEL.fullmatch(label) for label in labels) or labels[-1].isdigit():
        raise ValueError("not a domain name")
    for label in labels:
        if label.startswith("xn--"):
            try:
                label.encode("ascii").decode("idna")
            except (UnicodeError, LookupError):
                raise ValueError("not a domain name") from None
    return name


def parse_literal(text: str) -> str:
    """An address literal with its brackets, RFC 5321 4.1.3; returns the address.  Raises ValueError."""
    inner = text[1:-1]
    if inner[:5].upper() == "IPV6:":
        return str(ipaddress.IPv6Address(inner[5:]))
    return str(ipaddress.IPv4Address(inner))


class Path(NamedTuple):
    """One address as it will be sent.  `domain` is empty for `<>` and for
    `<postmaster>`, and in brackets for an address literal."""
    local: str
    domain: str
    routed: bool = False        # came with a source route, RFC 5321 C

    def __str__(self) -> str:
        return "%s@%s" % (self.local, self.domain) if self.domain else self.local

    @property
    def is_rerouting(self) -> bool:
        """Percent hack, bang path, source route, literal, or an @ within quotes,
        which some primary might take apart and send on."""
        return self.routed or self.domain[:1] == "[" or any(c in self.local for c in "%!@")


def parse_path(text: str, status: str) -> Tuple[Path, str]:
    """`<path>` at the start of `text` (RFC 5321 4.1.2) and what follows it.
    Raises Refuse(501, status)."""
    match = _PATH.match(text)
    if not match:
        raise Refuse(501, status, "Syntax error in address")
    rest = text[match.end():]
    if rest[:1] not in ("", " "):
        raise Refuse(501, "5.5.4", "Syntax error after the address")
    local, domain, bare = match.group("local"), match.group("domain"), match.group("bare")
    if local is None:
        if match.group("route"):
            raise Refuse(501, status, "Syntax error in address")
        return Path(bare or "", ""), rest
    if len(local.encode("utf-8")) > LOCAL_MAX or len(match.group().encode("utf-8")) > PATH_MAX:
        raise Refuse(501, status, "Address too long")
    try:
        if domain.startswith("["):
            parse_literal(domain)
        else:
            domain = parse_domain(domain)
        for hop in (match.group("route") or ":")[:-1].split(","):
            if hop and not hop.startswith("@["):
                parse_domain(hop[1:])
    except ValueError:
        raise Refuse(501, status, "Syntax error in the address's domain") from None
    return Path(local, domain, bool(match.group("route"))), rest


def parse_parameters(text: str) -> Dict[str, Optional[str]]:
    """ESMTP parameters of MAIL and RCPT, keys in upper case (RFC 5321 4.1.2)."""
    found: Dict[str, Optional[str]] = {}
    for word in text.split():
        match = _PARAMETER.fullmatch(word)
        if not match or match.group(1).upper() in found:
            raise Refuse(501, "5.5.4", "Syntax error in parameters")
        found[match.group(1).upper()] = match.group(2)
    return found


def parse_xtext(text: Optional[str], longest: int) -> str:
    """The text as received: xtext is passed on as it came (RFC 3461 4)."""
    if not text or len(text) > longest or not _XTEXT.fullmatch(text):
        raise Refuse(501, "5.5.4", "Syntax error in parameters")
    return text


def decode_xtext(text: str) -> str:
    return re.sub(r"\+([0-9A-F]{2})", lambda m: chr(int(m.group(1), 16)), text)


def encode_xtext(text: str, longest: int) -> str:
    """RFC 3461 4, cut to so many characters."""
    out = ""
    for octet in text.encode("utf-8"):
        more = chr(octet) if 33 <= octet <= 126 and octet not in b"+=" else "+%02X" % octet
        if len(out) + len(more) > longest:
            break
        out += more
    return out


def parse_notify(text: Optional[str]) -> str:
    """NOTIFY of RFC 3461 4.1, in upper case."""
    words = (text or "").upper().split(",")
    if words != ["NEVER"] and (set(words) - {"SUCCESS", "FAILURE", "DELAY"} or len(set(words)) != len(words)):
        raise Refuse(501, "5.5.4", "Syntax error in NOTIFY")
    return ",".join(words)


def parse_orcpt(text: Optional[str]) -> str:
    """ORCPT of RFC 3461 4.2: `addr-type;xtext`, as received."""
    kind, _, address = (text or "").partition(";")
    if not re.fullmatch(r"[A-Za-z0-9-]+", kind) or not address or len(address) > ORCPT_MAX:
        raise Refuse(501, "5.5.4", "Syntax error in ORCPT")
    if kind.lower() != "utf-8":
        parse_xtext(address, ORCPT_MAX)
    return "%s;%s" % (kind, address)


def parse_size(text: Optional[str]) -> int:
    """SIZE of RFC 1870 4: up to 20 digits."""
    if not text or not re.fullmatch(r"[0-9]{1,20}", text):
        raise Refuse(501, "5.5.4", "Syntax error in SIZE")
    return int(text)


def is_address(text: Any) -> bool:
    """An IP address, perhaps with the zone of a link-local one."""
    try:
        return bool(ipaddress.ip_address(text.partition("%")[0]))
    except (ValueError, AttributeError):
        return False


def is_below(name: str, parent: str) -> bool:
    """Whether `name` is `parent` or a subdomain: whole, or on a dot boundary."""
    return name == parent or name.endswith("." + parent)


def format_duration(seconds: float) -> str:
    """Two units are enough for a person: 45s, 2h14m, 6d3h."""
    return _format_seconds(max(0, int(seconds)))


@functools.lru_cache(maxsize=4096)      # a long queue has many of the same age
def _format_seconds(left: int) -> str:
    out: List[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        if left >= size or (unit == "s" and not out):
            out.append("%d%s" % (left // size, unit))
            left %= size
        elif out:
            break
        if len(out) == 2:
            break
    return "".join(out)


@functools.lru_cache(maxsize=4096)
def format_size(octets: float) -> str:
    for unit in ("B", "K", "M"):
        if octets < 1024:
            return "%d%s" % (octets, unit) if unit == "B" or octets >= 10 else "%.1f%s" % (octets, unit)
        octets /= 1024
    return "%.1fG" % octets


def plural(count: int, noun: str) -> str:
    return "%d %s%s" % (count, noun, "" if count == 1 else "s")


def printable(text: str, longest: int = LOG_TEXT_MAX) -> str:
    """Foreign text for a log line, a terminal or a header: one line, no
    control or direction characters, cut."""
    if len(text) > longest:
        text = text[:longest] + "..."
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ("\\x%02x" if ord(c) < 256 else "\\u%04x") % ord(c) for c in text)


def client_network(address: str) -> str:
    """What counts as one client: an IPv4 address, or an IPv6 /64."""
    if ":" not in address:
        return address
    return ipaddress.IPv6Address(address.partition("%")[0]).packed[:8].hex()


def greylist_network(address: str) -> str:
    """What counts as the same sender's hosts: an IPv4 /24, or an IPv6 /64."""
    return client_network(address) if ":" in address else address.rpartition(".")[0]


@functools.lru_cache(maxsize=16)
def format_date(second: int) -> str:
    """RFC 5322 3.3, local time.  Whatever arrives within a second bears the same."""
    return email.utils.formatdate(second, localtime=True)


def format_peer(address: str, name: str = "unknown") -> str:
    return "%s[%s]" % (name, address)


def format_delay(seconds: float) -> str:
    """As Postfix logs it: two digits of a short one, whole seconds of a long one, never an exponent."""
    return "%.2g" % seconds if 0.001 <= seconds < 10 else "%d" % seconds


class X509(NamedTuple):
    """What people ask of a certificate.  ssl tells it only of certificates it
    has verified, and of our own file not at all, so it is read here."""
    subject: str
    issuer: str
    names: Tuple[str, ...]      # DNS names and addresses of the subjectAltName; the common name where there is none
    since: Time
    until: Time

    def is_for(self, host: str) -> bool:
        """A wildcard stands for one whole leftmost label, RFC 6125 6.4.3."""
        return any(host.lower() == name or (name.startswith("*.") and host.lower().partition(".")[2] == name[2:])
                   for name in self.names)


def parse_der(data: bytes) -> List[Tuple[int, bytes]]:
    """The elements in `data`, each with its tag (X.690 8.1; no tag of a
    certificate has a second octet, and DER knows no indefinite length).  Raises ValueError."""
    out, at = [], 0
    while at < len(data):
        tag, size, start = data[at], data[at + 1] if at + 1 < len(data) else 0x80, at + 2
        if size >= 0x80:
            start += size - 0x80
            size = int.from_bytes(data[at + 2:start], "big") if at + 2 < start <= at + 6 else len(data)
        at = start + size
        if tag & 0x1f == 0x1f or at > len(data):
            raise ValueError("not DER")
        out.append((tag, data[start:at]))
    return out


_DER_NAMES = {b"\x55\x04\x03": "CN", b"\x55\x04\x0a": "O"}     # 2.5.4.3, 2.5.4.10
_DER_ALTERNATIVES = b"\x55\x1d\x11"                             # 2.5.29.17


def parse_certificate(der: bytes) -> X509:
    """RFC 5280 4.1, as much of it as X509 holds.  Raises ValueError."""
    try:
        fields = parse_der(parse_der(parse_der(der)[0][1])[0][1])
        fields = fields[fields[0][0] == 0xa0:]      # version, which the oldest do without
        issuer, validity, subject = (parse_der(fields[at][1]) for at in (2, 3, 4))
        names: List[str] = []
        for tag, data in fields[6:]:
            for _, extension in parse_der(parse_der(data)[0][1]) if tag == 0xa3 else ():
                parts = parse_der(extension)
                if parts[0][1] == _DER_ALTERNATIVES:
                    names += _alternative_names(parse_der(parse_der(parts[-1][1])[0][1]))
        common = dict(_distinguished(subject)).get("CN", "")
        whole = [", ".join("%s=%s" % pair for pair in _distinguished(one)) for one in (subject, issuer)]
        since, until = (_der_time(*one) for one in validity)
        return X509(whole[0], whole[1], tuple(names) or ((common.lower(),) if common else ()), since, until)
    except (IndexError, TypeError, OverflowError):
        raise ValueError("not a certificate") from None


def _distinguished(name: Sequence[Tuple[int, bytes]]) -> Iterator[Tuple[str, str]]:
    for _, group in name:
        for _, pair in parse_der(group):
            (_, kind), (tag, value) = parse_der(pair)[:2]
            if kind in _DER_NAMES:
                yield _DER_NAMES[kind], value.decode("utf-16-be" if tag == 0x1e else "utf-8", "replace")


def _alternative_names(names: Iterable[Tuple[int, bytes]]) -> Iterator[str]:
    """dNSName and iPAddress, RFC 5280 4.2.1.6."""
    for tag, value in names:
        if tag == 0x82:
            yield value.decode("ascii", "replace").lower()
        elif tag == 0x87 and len(value) in (4, 16):
            yield str(ipaddress.ip_address(value))


def _der_time(tag: int, value: bytes) -> Time:
    """RFC 5280 4.1.2.5: years of two digits from 50 on are of the 20th century."""
    text = value.decode("ascii", "replace")
    if tag == 0x17:
        text = ("19" if text >= "5" else "20") + text
    match = re.fullmatch(r"(\d{4})(\d\d)(\d\d)(\d\d)(\d\d)(\d\d)Z", text)
    if not match or tag not in (0x17, 0x18):
        raise ValueError("not a time")
    return float(calendar.timegm(tuple(map(int, match.groups())) + (0, 0, 0)))


def parse_pem(data: bytes) -> X509:
    """The first certificate of a PEM file: the server's own, as ssl reads it too.  Raises ValueError."""
    match = re.search(rb"-----BEGIN CERTIFICATE-----(.+?)-----END CERTIFICATE-----", data, re.DOTALL)
    if not match:
        raise ValueError("no certificate")
    return parse_certificate(base64.b64decode(match.group(1)))


# == 4. CONFIG =================================================================
# One table of options; text in, frozen Config or ConfigError(file, line) out.
# Pure: no file is opened here, so that --check and SIGHUP judge the same way.
# Parser, defaults, ranges, manual and etrn.conf.sample all come from OPTIONS.

class ConfigError(Exception):
    def __init__(self, file: str, line: int, text: str) -> None:
        super().__init__("%s:%d: %s" % (file, line, printable(text)))


class Endpoint(NamedTuple):
    """A host and port as configured.  The host is a name or an address without brackets."""
    host: str
    port: int

    def __str__(self) -> str:
        return ("[%s]:%d" if ":" in self.host else "%s:%d") % (self.host, self.port)


Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]


class Option(NamedTuple):
    section: str                # "domain" also stands for [defaults]
    name: str
    kind: str                   # a key of KINDS
    default: str                # as text; "" for none
    low: float                  # smallest value of a number, durations in seconds, sizes in octets
    high: float
    text: str                   # for the sample and the manual


_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_UNITS_OCTETS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
WEEK_S, YEAR_S = 604800.0, 31536000.0


def _words(text: str) -> List[str]:
    return text.replace(",", " ").split()


def _text(text: str) -> str:
    return text


def _duration(text: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([smhdw]?)", text.lower())
    if not match:
        raise ValueError("'%s' is not a duration (like 30s, 5m, 4h, 7d, 2w)" % text)
    return float(match.group(1)) * _UNITS_S[match.group(2) or "s"]


def _optional_duration(text: str) -> float:
    return 0.0 if text.lower() in ("off", "no", "none") else _duration(text)


def _size(text: str) -> int:
    match = re.fullmatch(r"([0-9]+)\s*([KMG]?)", text.upper())
    if not match:
        raise ValueError("'%s' is not a size (like 512K, 50M, 1G)" % text)
    return int(match.group(1)) * _UNITS_OCTETS.get(match.group(2), 1)


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]+", text):
        raise ValueError("'%s' is not a whole number" % text)
    return int(text)


def _web_address(text: str) -> str:
    if text and not re.fullmatch(r"https?://[!-~]+", text):
        raise ValueError("'%s' is not a web address (like https://example.org/hook)" % text)
    return text


def _flag(text: str) -> bool:
    value = configparser.ConfigParser.BOOLEAN_STATES.get(text.lower())
    if value is None:
        raise ValueError("'%s' is neither yes nor no" % text)
    return value


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in allowed:
            raise ValueError("'%s' is not one of: %s" % (text, ", ".join(allowed)))
        return text.lower()
    return parse


def _hostname(text: str) -> str:
    try:
        return parse_domain(text) if text else ""
    except ValueError:
        raise ValueError("'%s' is not a host name" % text) from None


def _endpoint(text: str, port: int = SMTP_PORT) -> Endpoint:
    match = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^\[\]:]+))(?::([0-9]{1,5}))?", text)
    if _may_hide_port(text):
        head, _, tail = text.rpartition(":")
        raise ValueError("'%s' may or may not end with a port: write [%s]:%s, or [%s]" % (text, head, tail, text))
    if match:
        host, digits = match.group(1) or match.group(2), match.group(3)
        port = int(digits) if digits else port
    else:
        host = text                                     # perhaps a bare IPv6 address
    try:
        host = str(ipaddress.ip_address(host))
    except ValueError:
        if not match or match.group(1):
            raise ValueError("'%s' is not a host or address, with or without :port" % text) from None
        host = _hostname(host)
    if port > 65535:
        raise ValueError("'%s': there is no port %d" % (text, port))
    return Endpoint(host, port)


def _may_hide_port(text: str) -> bool:
    """::1:25 is an address, but hardly the one that was meant.  2001:db8::53 is one without doubt."""
    head, _, tail = text.rpartition(":")
    try:
        ipaddress.IPv6Address(text)
        ipaddress.IPv6Address(head)
        return tail.isdigit()
    except ValueError:
        return False


def _remote(text: str, port: int = SMTP_PORT) -> Endpoint:
    """Where a connection goes to."""
    where = _endpoint(text, port)
    if not where.port:
        raise ValueError("'%s': there is no port 0" % text)
    return where


def _listen(text: str, port: int = SMTP_PORT) -> Tuple[Endpoint, ...]:
    """Addresses to serve; a bare port means all of them; localhost means both loopback addresses."""
    out: List[Endpoint] = []
    if text and not _words(text):
        raise ValueError("is empty")
    for word in _words(text):
        if word.isdigit():
            word = "0.0.0.0:%s,[::]:%s" % (word, word)
        for part in word.split(","):
            where = _endpoint(part, port)
            hosts = ["127.0.0.1", "::1"] if where.host == "localhost" else [where.host]
            for host in hosts:
                try:
                    ipaddress.ip_address(host)
                except ValueError:
                    raise ValueError("'%s' is not an address of this machine" % part) from None
                out.append(Endpoint(host, where.port))
    return tuple(dict.fromkeys(out))


def _page(text: str) -> Optional[Endpoint]:
    """Where the status page is.  No port is usual for it, so that one must be named."""
    if not text:
        return None
    where = Endpoint("0.0.0.0", int(text)) if text.isdigit() else _endpoint(text, -1)
    if not 0 <= where.port <= 65535:
        raise ValueError("'%s' is not an address with a port, like 127.0.0.1:8025" % text)
    return where


def _domains(text: str) -> Tuple[str, ...]:
    return tuple(_served(word) for word in _words(text))


def _served(text: str) -> str:
    try:
        return "." + parse_domain(text[1:]) if text.startswith(".") else parse_domain(text)
    except ValueError:
        hint = " (all subdomains are written .%s)" % text[2:] if text.startswith("*.") else ""
        raise ValueError("'%s' is not a domain%s" % (text, hint)) from None


def _networks(text: str) -> Tuple[Network, ...]:
    try:
        return tuple(ipaddress.ip_network(word) for word in _words(text) if word.lower() != "none")
    except ValueError as error:
        raise ValueError("%s (a network is written like 192.0.2.0/24)" % error) from None


def _etrn(text: str) -> Union[str, Tuple[Network, ...]]:
    return text.lower() if text.lower() in ("any", "none") else _networks(text)


def _nameservers(text: str) -> Union[str, Tuple[Endpoint, ...]]:
    if text.startswith("/"):
        return text
    out = tuple(_remote(word, 53) for word in _words(text))
    for where in out:
        try:
            ipaddress.ip_address(where.host)
        except ValueError:
            raise ValueError("'%s' is not the address of a DNS server" % where.host) from None
    return out


def _primary(text: str) -> Union[str, Tuple[Endpoint, ...]]:
    if text.lower() in ("mx", "atrn", "etrn"):
        return text.lower()
    words = _words(text)
    alone = next((word for word in words if word.lower() in ("mx", "atrn", "etrn")), "")
    if alone or not words:
        raise ValueError("'%s' stands alone, without other hosts" % alone if alone else "is empty")
    return tuple(_remote(word) for word in words)


def _route(text: str) -> Union[str, Endpoint]:
    return "mx" if text.lower() == "mx" else _remote(text)


def _recipients(text: str) -> Union[str, FrozenSet[str]]:
    if text.startswith("file:"):
        if not text[5:].strip():
            raise ValueError("'file:' needs a path behind it")
        return text
    if text.lower() in ("any", "verify"):
        return text.lower()
    out = set()
    for word in _words(text):
        try:
            path, rest = parse_path("<%s>" % word, "5.1.3")
        except Refuse:
            raise ValueError("'%s' is not an address (or any, verify, file:PATH)" % word) from None
        if not path.domain or rest:
            raise ValueError("'%s' is not an address (or any, verify, file:PATH)" % word)
        out.add(str(path).lower())
    return frozenset(out)


def _login(text: str) -> str:
    """A name or a password.  It must fit PLAIN, RFC 4616 2."""
    if len(text.encode("utf-8")) > LOGIN_MAX or not text.isprintable():
        raise ValueError("longer than %d octets, or with control characters" % LOGIN_MAX)
    return text


def _tls(text: str) -> str:
    value = text.lower()
    if value in ("none", "may", "require", "verify"):
        return value
    if not re.fullmatch(r"sha256:(?:[0-9a-f]{2}:?){32}", value):
        raise ValueError("'%s' is not one of: none, may, require, verify, sha256:HEX" % text)
    return "sha256:" + value[7:].replace(":", "")


def _address(text: str) -> str:
    if not text:
        return ""
    try:
        path, rest = parse_path("<%s>" % text, "5.1.3")
    except Refuse:
        raise ValueError("'%s' is not a mail address" % text) from None
    if not path.domain or rest:
        raise ValueError("'%s' is not a mail address" % text)
    return str(path)


KINDS: Dict[str, Callable[[str], Any]] = {
    "text": _text, "word": _text, "path": _text, "duration": _duration, "optional duration": _optional_duration, "size": _size,
    "count": _count, "flag": _flag, "host": _hostname, "listen": _listen, "domains": _domains, "networks": _networks,
    "etrn": _etrn, "nameservers": _nameservers, "primary": _primary, "route": _route, "recipients": _recipients,
    "odmr listen": lambda text: _listen(text, ODMR_PORT), "login": _login,
    "tls": _tls, "address": _address, "page": _page, "web address": _web_address,
    "level": _choice("debug", "info", "warning", "error"), "newline": _choice("normalize", "reject"),
    "while up": _choice("relay", "defer"), "unknown": _choice("accept", "defer"),
}
FREE_TEXT = ("text", "login")   # kinds in which " #" and " ;" belong to the value: commands and passwords
LISTS = ("listen", "odmr listen", "domains", "networks", "etrn", "nameservers", "primary", "recipients")     # on several lines
INF = float("inf")

OPTIONS: Tuple[Option, ...] = (
    Option("relay", "hostname", "host", "", 0, 0, "The name this host has in MX records; banner, EHLO, Received.\n"
           "Default: the machine's full name"),
    Option("relay", "listen", "listen", "0.0.0.0:25, [::]:25", 0, 0, "Addresses to serve SMTP on; a bare port means all."),
    Option("relay", "spool", "path", "", 0, 0, "The directory that holds all state.\n"
           "Default: spool, beside the configuration file"),
    Option("relay", "user", "word", "", 0, 0, "Account to become once ports are bound."),
    Option("relay", "domains", "domains", "", 0, 0, "Domains that need no section of their own (all defaults)."),
    Option("relay", "nameservers", "nameservers", "/etc/resolv.conf", 0, 0, "DNS servers: address or address:port."),
    Option("relay", "log", "path", "stderr", 0, 0, "stderr, syslog, or a file (reopened on SIGHUP)."),
    Option("relay", "log_level", "level", "info", 0, 0, "debug, info, warning or error."),
    Option("relay", "max_message_size", "size", "50M", 0, INF, "Announced in SIZE, unless a primary takes less:\n"
           "then the least of what the primaries take.  0 means no limit but theirs and the disk."),
    Option("relay", "max_recipients", "count", "1000", 1, 50000, "For one message; more get 452 4.5.3."),
    Option("relay", "min_free_space", "size", "100M", 0, INF,
           "Below it new mail gets 452 4.3.1; queued mail still leaves."),
    Option("relay", "max_connections", "count", "1000", 1, 100000, "Clients at once; more get 421."),
    Option("relay", "max_connections_per_client", "count", "50", 0, 100000, "For an IPv4 address or IPv6 /64; 0 = no limit."),
    Option("relay", "max_message_rate", "count", "0", 0, 1000000, "Messages a minute from one client; 0 = no limit."),
    Option("relay", "command_timeout", "duration", "5m", 1, 3600, "Idle time before 421."),
    Option("relay", "trusted_clients", "networks", "", 0, 0, "Networks free of the per-client limits."),
    Option("relay", "bare_newline", "newline", "normalize", 0, 0, "Stray CR and LF in mail: normalize, or reject (550)."),
    Option("relay", "greet_pause", "duration", "0", 0, 60, "Wait before the banner; who speaks first is turned away."),
    Option("relay", "odmr_listen", "odmr listen", "", 0, 0, "Addresses for on-demand relay (ATRN), usually port 366."),
    Option("tls", "certificate", "path", "", 0, 0, "PEM files; with both, STARTTLS is offered.\n"
           "Reread when they change; with user set, that account must be able to."),
    Option("tls", "key", "path", "", 0, 0, ""),
    Option("bounces", "route", "route", "mx", 0, 0, "How notices to senders leave: mx, or a smarthost host[:port]."),
    Option("bounces", "username", "word", "", 0, 0, "AUTH at the smarthost, over TLS only."),
    Option("bounces", "password", "text", "", 0, 0, "The password, or file:PATH."),
    Option("bounces", "postmaster", "address", "", 0, 0, "Gets notices that could not be delivered."),
    Option("status", "listen", "page", "", 0, 0, "Address of the status page, /metrics, /healthz, /status.json,\n"
           "like 127.0.0.1:8025; a bare port means all of IPv4, [::]:8025 both."),
    Option("status", "token", "text", "", 0, 0, "Asked as bearer token or basic-auth password when set."),
    Option("alerts", "command", "text", "", 0, 0, "Run when a primary goes down, comes back, or rejects, and when mail,\n"
           "the disk or the certificate comes to its end."),
    Option("alerts", "webhook", "web address", "", 0, 0, "Gets the same as a JSON POST."),
    Option("alerts", "mail", "address", "", 0, 0, "Gets the same as mail."),
    Option("alerts", "mail_route", "route", "mx", 0, 0, "How that mail leaves: mx, or host[:port]."),
    Option("alerts", "after", "duration", "5m", 0, WEEK_S, "A primary must be down so long before the first alert."),
    Option("domain", "primary", "primary", "mx", 0, 0, "Where this domain's mail goes: mx, or hosts to try in order,\n"
           "like mail.example.org:25, [192.0.2.7]:2525; atrn (it waits to be collected),\n"
           "or etrn (to the address of the last authenticated ETRN)."),
    Option("domain", "lifetime", "duration", "7d", 1, YEAR_S, "How long mail is kept before the sender is told."),
    Option("domain", "delay_notice", "optional duration", "off", 0, YEAR_S, "Age at which the sender is told of the delay."),
    Option("domain", "recipients", "recipients", "verify", 0, 0, "any, verify (ask the primary, and remember),\n"
           "file:PATH with an address a line, or addresses.  postmaster is always taken."),
    Option("domain", "while_up", "while up", "relay", 0, 0, "relay, or defer mail while the primary is known to be up."),
    Option("domain", "unknown_recipients", "unknown", "accept", 0, 0, "While the primary cannot be asked: accept or defer."),
    Option("domain", "cutthrough", "flag", "yes", 0, 0,
           "While the primary is up, and not just back, answer with its own verdict."),
    Option("domain", "etrn", "etrn", "any", 0, 0, "Who may ask to flush: any, none, or networks."),
    Option("domain", "username", "login", "", 0, 0, "For ATRN and authenticated ETRN.  Domains may share one."),
    Option("domain", "password", "login", "", 0, 0, "The password, or file:PATH."),
    Option("domain", "tls", "tls", "may", 0, 0, "Towards the primary: none, may, require, verify, or sha256:HEX."),
    Option("domain", "connections", "count", "10", 1, 100, "Most delivery connections to the primary at once."),
    Option("domain", "probe_interval", "duration", "5s", 1, 3600, "How often a down primary is tried while mail waits."),
    Option("domain", "retry_interval", "duration", "5m", 1, 86400, "First pause after a 4xx for one message; it doubles ..."),
    Option("domain", "max_retry_interval", "duration", "1h", 1, WEEK_S, "... up to this."),
    Option("domain", "recovery_grace", "duration", "1h", 0, WEEK_S,
           "So long after an outage 5xx answers are kept and tried again."),
    Option("domain", "xclient", "flag", "no", 0, 0, "Hand the original client to a primary that offers XCLIENT."),
    Option("domain", "max_queue_size", "size", "", 1, INF, "Octets this domain may hold; more get 452 4.2.2."),
)


@dataclasses.dataclass(frozen=True)
class DomainConfig:
    name: str                   # "example.com", ".example.com", or "" for [defaults]
    primary: Union[str, Tuple[Endpoint, ...]] = "mx"
    lifetime: float = 604800.0
    delay_notice: float = 0.0
    recipients: Union[str, FrozenSet[str]] = "verify"
    while_up: str = "relay"
    unknown_recipients: str = "accept"
    cutthrough: bool = True
    etrn: Union[str, Tuple[Network, ...]] = "any"
    username: str = ""
    password: str = ""
    tls: str = "may"
    connections: int = 10
    probe_interval: float = 5.0
    retry_interval: float = 300.0
    max_retry_interval: float = 3600.0
    recovery_grace: float = 3600.0
    xclient: bool = False
    max_queue_size: Optional[int] = None
    is_notices: bool = False    # no domain of ours: notices to senders, by [bounces] route


@dataclasses.dataclass(frozen=True)
class Config:
    """All options: [relay] as they are named, other sections with their name before."""
    file: str
    hostname: str
    listen: Tuple[Endpoint, ...]
    spool: str
    user: str
    nameservers: Union[str, Tuple[Endpoint, ...]]
    log: str
    log_level: str
    max_message_size: int
    max_recipients: int
    min_free_space: int
    max_connections: int
    max_connections_per_client: int
    max_message_rate: int
    command_timeout: float
    trusted_clients: Tuple[Network, ...]
    bare_newline: str
    greet_pause: float
    odmr_listen: Tuple[Endpoint, ...]
    tls_certificate: str
    tls_key: str
    bounces_route: Union[str, Endpoint]
    bounces_username: str
    bounces_password: str
    bounces_postmaster: str
    status_listen: Optional[Endpoint]
    status_token: str
    alerts_command: str
    alerts_webhook: str
    alerts_mail: str
    alerts_mail_route: Union[str, Endpoint]
    alerts_after: float
    defaults: DomainConfig
    domains: Mapping[str, DomainConfig]     # in the order of the file; wildcards start with a dot

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

    def is_trusted(self, address: str) -> bool:
        return is_within(address, self.trusted_clients)

    @property
    def has_logins(self) -> bool:
        """Whether anybody could pass AUTH, so that it is worth offering."""
        return any(cfg.username for cfg in self.domains.values())

    def is_owned(self, name: str, username: str) -> bool:
        """Whether `name` is served, for the customer who authenticated as `username`."""
        cfg = self.domain(name)
        return cfg is not None and cfg.username == username != ""


def is_within(address: str, networks: Sequence[Network]) -> bool:
    if not networks:
        return False
    ip = ipaddress.ip_address(address.partition("%")[0])
    return any(ip in network for network in networks if network.version == ip.version)


SECTION_HEAD = re.compile(r"\[(?P<header>[^]]+)\]")


class _Lines:
    """Which line a section or key stands on, and for a key those its value goes
    on in; configparser does not tell.  What is a continuation is judged as it
    does: any line indented deeper than the key."""

    def __init__(self, text: str) -> None:
        self.sections: Dict[str, int] = {}
        self.keys: Dict[Tuple[str, str], List[int]] = {}
        self.odd: Dict[int, str] = {}           # section heads with something behind them that is no comment
        section, key, indent = "", "", 0
        for number, line in enumerate(text.split("\n"), 1):
            bare = line.strip()
            if bare[:1] in ("", "#", ";"):
                continue
            depth = len(line) - len(line.lstrip())
            if key and depth > indent:
                self.keys[section, key].append(number)
                continue
            indent = depth
            head = SECTION_HEAD.match(bare)
            if head:
                section, key, behind = head.group("header"), "", bare[head.end():].strip()
                self.sections.setdefault(section, number)
                if behind[:1] not in ("", "#", ";"):
                    self.odd[number] = behind
            else:
                key = re.split(r"[=:]", bare, maxsplit=1)[0].strip().lower()
                self.keys.setdefault((section, key), [number])

    def of(self, *places: Tuple[str, str]) -> int:
        """The line of the first of these (section, key) that is there, else of the first section that is."""
        given = [self.keys[place][0] for place in places if place in self.keys]
        return (given + [self.sections[section] for section, _ in places if section in self.sections] + [0])[0]


SECTIONS = ("relay", "tls", "bounces", "status", "alerts", "defaults")


def _domain_of(section: str) -> Optional[str]:
    """NAME of [domain NAME], and None for any other section."""
    words = section.split(None, 1)
    return words[1].strip() if words[:1] == ["domain"] and len(words) == 2 else "" if words == ["domain"] else None


def parse_config(text: str, file: str, fqdn: str = "localhost") -> Config:
    """The whole file.  `fqdn` is the machine's name, for the default of
    `hostname`.  Raises ConfigError at the first fault."""
    parser = configparser.ConfigParser(interpolation=None, default_section="\0", delimiters=("=", ":"))
    parser.SECTCRE = SECTION_HEAD       # the default is another one from 3.11 on
    text = text[1:] if text.startswith("\ufeff") else text      # Windows editors begin a file with this mark
    lines = _Lines(text)
    try:
        parser.read_string(text, file)
    except configparser.DuplicateSectionError as error:
        raise ConfigError(file, error.lineno or 0, "section [%s] is there twice" % error.section) from None
    except configparser.DuplicateOptionError as error:
        raise ConfigError(file, error.lineno or 0, "option '%s' is there twice" % error.option) from None
    except configparser.MissingSectionHeaderError as error:
        raise ConfigError(file, error.lineno, "an option before the first [section]") from None
    except configparser.ParsingError as error:
        line = error.errors[0][0] if error.errors else 0
        raise ConfigError(file, line, "neither [section], option = value, nor a comment") from None
    for line, behind in lines.odd.items():
        raise ConfigError(file, line, "'%s' stands behind a [section]; options have lines of their own" % behind)
    values: Dict[str, Dict[str, Any]] = {name: {} for name in SECTIONS}
    domains: Dict[str, Dict[str, Any]] = {}
    places: Dict[str, str] = {}             # where a domain's section is: its name as written
    for section in parser.sections():
        line = lines.sections.get(section, 0)
        domain = _domain_of(section)
        if domain is not None:
            try:
                name = _served(domain)
            except ValueError as error:
                raise ConfigError(file, line, "[%s]: %s" % (section, error)) from None
            if name in domains:
                raise ConfigError(file, line, "domain %s is there twice" % name)
            target, places[name] = domains.setdefault(name, {}), section
        elif section in values:
            target = values[section]
        else:
            raise ConfigError(file, line, "unknown section [%s]%s" % (section, _meant_section(section)))
        kind = "domain" if section == "defaults" or domain is not None else section
        for key, raw in parser.items(section):
            target[key] = _parse_option(kind, key, raw or "", file, lines.keys.get((section, key), [line]))
    return _build_config(values, domains, file, fqdn, lines, places)


def _meant(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, 1, 0.6)
    return " (did you mean '%s'?)" % near[0] if near else ""


def _meant_section(section: str) -> str:
    """As _meant(); what [domainexample.com] or [Domains example.com] should be is [domain example.com]."""
    match = re.fullmatch(r"domains?[\s.:=]*(\S+\.\S+)", section.strip().lower())
    return " (did you mean 'domain %s'?)" % match.group(1) if match else _meant(
        section.strip().lower(), SECTIONS + ("domain NAME",))


def _parse_option(kind: str, key: str, raw: str, file: str, lines: Sequence[int]) -> Any:
    """`raw` is the value as configparser has it, `lines` are those it stands on."""
    known = {option.name: option for option in OPTIONS if option.section == kind}
    option = known.get(key)
    if option is None:
        raise ConfigError(file, lines[0], "unknown option '%s'%s" % (key, _meant_option(kind, key, list(known))))
    parts = [part.strip() for number, part in enumerate(raw.split("\n")) if part.strip() or not number]
    if option.kind not in FREE_TEXT:
        parts = [re.sub(r"(?:^|\s)[#;].*", "", part).strip() for part in parts]
    if len(parts) > 1 and option.kind not in LISTS:
        raise ConfigError(file, (list(lines) * 2)[1], "this indented line goes on with '%s', which takes one line" % key)
    value = " ".join(filter(None, parts))
    if value.lower() == "none" and not option.default and option.kind not in FREE_TEXT + ("host", "path"):
        value = ""                      # as the manual writes such a default
    try:
        if not value and option.default and option.kind != "networks":
            raise ValueError("is empty")
        parsed = KINDS[option.kind](value) if value or option.kind not in ("size", "count", "duration") else None
    except ValueError as error:
        raise ConfigError(file, _line_at_fault(option, parts, lines), "%s: %s" % (key, error)) from None
    if isinstance(parsed, (int, float)) and not isinstance(parsed, bool) and not option.low <= parsed <= option.high:
        raise ConfigError(file, lines[0], "%s: '%s' is out of range (%s)" % (key, value, _range(option)))
    return parsed


def _meant_option(kind: str, key: str, known: Sequence[str]) -> str:
    """An option at the wrong place is told where it belongs."""
    homes = ["[domain NAME] or [defaults]" if option.section == "domain" else "[%s]" % option.section
             for option in OPTIONS if option.name == key and option.section != kind]
    return " (it belongs to %s)" % " or ".join(homes) if homes else _meant(key, known)


def _line_at_fault(option: Option, parts: Sequence[str], lines: Sequence[int]) -> int:
    """Of a list on several lines, the one that cannot be parsed on its own."""
    for part, line in zip(parts, lines):
        try:
            if part.strip(", "):
                KINDS[option.kind](part)
        except ValueError:
            return line
    return lines[0]


def _range(option: Option) -> str:
    def show(number: float) -> str:
        if option.kind.endswith("duration"):
            return format_duration(number)
        return format_size(number) if option.kind == "size" else "%d" % number
    return "at least %s" % show(option.low) if option.high == INF else "%s to %s" % (show(option.low), show(option.high))


def _build_config(values: Dict[str, Dict[str, Any]], domains: Dict[str, Dict[str, Any]], file: str, fqdn: str,
                  lines: _Lines, places: Mapping[str, str]) -> Config:
    flat: Dict[str, Any] = {}
    for option in OPTIONS:
        if option.section != "domain":
            name = option.name if option.section == "relay" else "%s_%s" % (option.section, option.name)
            given = values[option.section].get(option.name)
            flat[name] = given if given is not None else KINDS[option.kind](option.default)
    plain = flat.pop("domains")
    flat["hostname"] = flat["hostname"] or fqdn
    folder = os.path.dirname(os.path.abspath(file))
    flat["spool"] = os.path.join(folder, flat["spool"] or "spool")
    if flat["log"] not in ("stderr", "syslog"):
        flat["log"] = os.path.join(folder, flat["log"])
    for one, other in (("tls_certificate", "tls_key"), ("tls_key", "tls_certificate"), ("bounces_username", "bounces_password"),
                       ("bounces_password", "bounces_username")):
        if flat[one] and not flat[other]:
            section, _, name = one.partition("_")
            raise ConfigError(file, lines.of((section, name)), "%s needs %s beside it" % (name, other.partition("_")[2]))
    for name in ("tls_certificate", "tls_key"):
        flat[name] = flat[name] and os.path.join(folder, flat[name])
    if flat["bounces_password"].startswith("file:"):
        flat["bounces_password"] = "file:" + os.path.join(folder, flat["bounces_password"][5:].strip())
    defaults = {option.name: _default(option) for option in OPTIONS if option.section == "domain"}
    defaults.update({key: value for key, value in values["defaults"].items() if value is not None})
    served: Dict[str, DomainConfig] = {}
    for name in list(plain) + list(domains):
        own = {key: value for key, value in domains.get(name, {}).items() if value is not None}
        served[name] = DomainConfig(name, **{**defaults, **own})
    for name, cfg in served.items():
        served[name] = cfg = _fit_pauses(cfg, {**values["defaults"], **domains.get(name, {})}, file, lines, places.get(name, ""))
        if isinstance(cfg.recipients, str) and cfg.recipients.startswith("file:"):
            path = os.path.join(folder, cfg.recipients[5:].strip())
            served[name] = dataclasses.replace(cfg, recipients="file:" + path)
    served = _check_logins(served, file, folder, lines)
    for where in flat["odmr_listen"]:
        if where.port and where in flat["listen"]:
            raise ConfigError(file, lines.of(("relay", "odmr_listen")), "odmr_listen: %s is in listen too" % str(where))
    common = _fit_pauses(DomainConfig("", **defaults), values["defaults"], file, lines, "defaults")
    return Config(file=file, defaults=common, domains=served, **flat)


def _fit_pauses(cfg: DomainConfig, given: Mapping[str, Any], file: str, lines: _Lines, section: str) -> DomainConfig:
    """Where one of the two pauses between attempts is set, a default follows it; where both are, they must agree."""
    if cfg.max_retry_interval >= cfg.retry_interval:
        return cfg
    if "max_retry_interval" not in given:
        return dataclasses.replace(cfg, max_retry_interval=cfg.retry_interval)
    if "retry_interval" not in given:
        return dataclasses.replace(cfg, retry_interval=cfg.max_retry_interval)
    places = [(place, key) for place in (section, "defaults") for key in ("max_retry_interval", "retry_interval")]
    raise ConfigError(file, lines.of(*places), "max_retry_interval is smaller than retry_interval")


def _check_logins(served: Mapping[str, DomainConfig], file: str, folder: str, lines: _Lines) -> Dict[str, DomainConfig]:
    """The domains, with whole paths of password files.  A name goes with one
    password, or it would not say who came."""
    places = {_served(section.partition(" ")[2].strip()): section for section in lines.sections if section[:7] == "domain "}
    passwords: Dict[str, str] = {}
    out = {}
    for name, cfg in served.items():
        def fault(option: str, text: str, section: str = places.get(name, "")) -> ConfigError:
            return ConfigError(file, lines.of((section, option), ("defaults", option)), text)
        if bool(cfg.username) != bool(cfg.password):
            there, missing = ("username", "password") if cfg.username else ("password", "username")
            raise fault(there, "%s needs %s beside it" % (there, missing))
        if cfg.password.startswith("file:"):
            cfg = dataclasses.replace(cfg, password="file:" + os.path.join(folder, cfg.password[5:].strip()))
        if passwords.setdefault(cfg.username, cfg.password) != cfg.password:
            raise fault("password", "username '%s' has another password elsewhere" % cfg.username)
        out[name] = cfg
    return out


def _default(option: Option) -> Any:
    return KINDS[option.kind](option.default) if option.default or option.kind not in ("size", "count") else None


SAMPLE_HEAD = """\
# etrn.conf - the configuration of etrn_relay.py, a backup mail exchanger.
#
# As it stands this file runs, unprivileged, on loopback: a try-out.  For a
# real backup MX set hostname, listen and your domain; leave the rest alone.
# Durations: 30s 5m 4h 7d 2w.  Sizes: 512K 50M 1G.  Lists: comma or space.
"""
SAMPLE_VALUES = {("relay", "hostname"): "backup.example.net", ("relay", "listen"): "127.0.0.1:2525",
                 ("domain", "primary"): "127.0.0.1:2526"}


def format_sample() -> str:
    """The text of etrn.conf.sample."""
    out = [SAMPLE_HEAD]
    section = ""
    for option in OPTIONS:
        if option.section != section:
            section = option.section
            out.append("\n[%s]" % ("domain example.com" if section == "domain" else section))
            if section == "domain":
                out.append("# [defaults] takes the same keys, for all domains; [domain .example.com]\n"
                           "# means all subdomains of example.com.")
        out.extend("# " + line for line in option.text.split("\n") if line)
        value = SAMPLE_VALUES.get((section, option.name))
        out.append("#%s = %s" % (option.name, option.default) if value is None else "%s = %s" % (option.name, value))
    return "\n".join(out) + "\n"


# == 5. LOG ====================================================================
# Formats, escapes and writes events; the only writer to syslog, stderr or the
# log file.  Used by the loop thread alone: workers hand their events over as
# values, so lines of one message keep their order.

LEVELS = {"debug": 0, "info": 1, "warning": 2, "error": 3}


def describe(error: OSError) -> str:
    return "%s: %s" % (error.filename, error.strerror) if error.filename and error.strerror else error.strerror or str(error)


def short_name(hostname: str) -> str:
    return hostname.partition(".")[0] or "localhost"


class Log:
    """Lines are gathered and written once a turn of the loop."""

    def __init__(self, where: str, level: str, hostname: str) -> None:
        self.level = LEVELS[level]
        self.host = short_name(hostname)
        self.pid = os.getpid()
        self.lines: List[str] = []
        self.stamp = ("", 0)
        self.where = where
        self.service = ""               # whose tag the next line to syslog gets
        self.file: Optional[TextIO] = None
        self.on_event: Callable[[str, str, str], None] = lambda service, text, level: None     # set by the server
        self.reopen()

    def reopen(self, where: str = "") -> None:
        """Open the file again, after a rotation, or go on elsewhere.  Raises OSError and leaves the old one in use."""
        self.flush()
        where, new = where or self.where, None
        if where == "syslog":
            if syslog is None:
                raise OSError("this Python has no syslog module")
            self.service = ""
        elif where != "stderr":
            new = open(where, "a", encoding="utf-8", errors="backslashreplace")
        if self.file:
            self.file.close()
        self.where, self.file = where, new

    def write(self, service: str, text: str, level: str = "info") -> None:
        """One event.  Foreign parts of `text` must have been through printable()."""
        self.on_event(service, text, level)
        if LEVELS[level] < self.level:
            return
        if level in ("warning", "error"):
            text = "%s: %s" % (level, text)
        if self.where == "syslog":
            return self._to_syslog(service, text, level)
        now = int(time.time())
        if now != self.stamp[1]:
            self.stamp = (time.strftime("%b %e %H:%M:%S", time.localtime(now)), now)
        self.lines.append("%s %s etrn_relay/%s[%d]: %s\n" % (self.stamp[0], self.host, service, self.pid, text))

    def _to_syslog(self, service: str, text: str, level: str) -> None:
        """The tag is the service's, as in a file, and the priority the event's."""
        if service != self.service:
            self.service = service
            syslog.openlog("etrn_relay/" + service, syslog.LOG_PID, syslog.LOG_MAIL)
        priority = {"debug": syslog.LOG_DEBUG, "info": syslog.LOG_INFO, "warning": syslog.LOG_WARNING}.get(level, syslog.LOG_ERR)
        syslog.syslog(priority, text.replace("\0", " "))

    def bug(self, error: BaseException) -> None:
        """A traceback on one line; the session or job at fault is dropped by the caller."""
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        self.write("master", "bug: " + printable(text, 4000), "error")

    def flush(self) -> None:
        if not self.lines:
            return
        lines, self.lines = self.lines, []
        try:
            target = self.file or sys.stderr
            target.write("".join(lines))
            target.flush()
        except (OSError, ValueError):
            pass                # a full log disk or a closed terminal must not stop the mail


# == 6. SPOOL ==================================================================
# Owns every file below the spool directory; nothing else here opens one.
# Uses 2 LIMITS, 3 GRAMMAR.  Runs in committer and delivery threads and in the
# clerk, never in the loop.  Commit point: the second rename in Spool.commit().
#
#   files in        SPOOL/       incoming/     done/   what it is, and what a start does with it
#   S1              -            .eml          -       being received            delete
#   S2              -            .eml .json    -       written, not renamed      delete
#   S3              .eml         .json         -       between the renames       delete both, never acknowledged
#   S4              .eml .json   -             -       queued                    load
#   S5              .eml .json   .new          -       sidecar being replaced    load, delete .new
#   S6              .eml         -             .json   finished                  delete both
#   S7              -            -             .eml .json   finished, empty: to be used again   delete
#   S8              .eml         -             -       a stranger, or a disk's fault   corrupt/, once an hour old
#   S9              .json        -             -       its body is gone          corrupt/
#
# What is found half at SIGHUP, and changed within COPY_S, is being copied in: looked at again.

FORMAT = 1                      # of the sidecar
_ID = re.compile(r"[0-9A-F]{6,20}")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SICK = (errno.EIO, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ESTALE)     # the last three: unmounted, moved, removed
_UNREADABLE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)


class Corrupt(Exception):
    """A pair that cannot be trusted; its text says why."""


class SpoolBusy(Exception):
    """Another process holds the spool's lock."""


class Draft:
    """A message on its way to the spool.  The loop fills `blocks`; after that
    one committer at a time has it."""
    __slots__ = ("id", "blocks", "pending", "fd", "sidecar_fd", "size", "digest", "error", "busy", "ended")

    def __init__(self, id: str, head: bytes = b"") -> None:
        self.id = id
        self.blocks: List[bytes] = [head] if head else []
        self.pending = len(head)        # octets in blocks
        self.fd = -1                    # of the body
        self.sidecar_fd = -1
        self.size = 0
        self.digest = hashlib.sha256()
        self.error: Optional[OSError] = None
        self.busy = False               # with a committer now
        self.ended = 0.0                # monotonic, when the end of its data came

    def take(self) -> List[bytes]:
        blocks, self.blocks, self.pending = self.blocks, [], 0
        return blocks


class Spool:
    """The queue on disk.  Methods may be called from any thread, but for one
    message from one at a time; the server sees to that."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.incoming = os.path.join(path, "incoming")
        self.done = os.path.join(path, "done")
        self.bad = os.path.join(path, "corrupt")
        self.directory = -1             # descriptor of `path`, for fsync
        self.lock_fd = -1
        self.sick = ""                  # why no new mail is taken, or empty
        self.fsync_s = 0.0              # what each fsync took in the last batch
        self.corrupt_count = 0
        self.spares: Deque[str] = collections.deque()       # names in done/ of files that may be used again
        self.entering: Set[str] = set()         # between their renames and their 250; not to be loaded yet
        self.state_lock = threading.Lock()
        self.saved: Dict[str, int] = {}         # the number of the last save of each

    # -- opening

    def open(self) -> None:
        """Create what is missing, take the lock, remove what was never
        acknowledged.  Raises SpoolBusy or OSError."""
        os.makedirs(self.path, 0o700, exist_ok=True)
        self.lock()
        self.directory = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        with self._durable(self.path):
            self._make_folders()
            self.sweep()
        with contextlib.suppress(PermissionError):      # not ours, and so not made by us
            with self._durable(os.path.dirname(os.path.realpath(self.path))):
                pass                    # the spool directory itself may be new
        self.corrupt_count = sum(name.endswith(".eml") or not self._has(self.bad, name[:-5] + ".eml")
                                 for name in os.listdir(self.bad) if name.endswith((".eml", ".json")))

    def lock(self) -> None:
        fd = os.open(os.path.join(self.path, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        end = time.monotonic() + LOCK_WAIT_S
        try:
            while not self._is_locked(fd):
                holder = os.pread(fd, 20, 0).decode("ascii", "replace").strip()
                if self._is_alive(holder) or time.monotonic() > end:
                    raise SpoolBusy("%s is in use by process %s" % (self.path, printable(holder) or "unknown"))
                time.sleep(LOCK_POLL_S)
        except BaseException:
            os.close(fd)
            raise
        self.lock_fd = fd
        try:
            os.ftruncate(fd, 0)
            os.write(fd, b"%d\n" % os.getpid())
        except OSError:
            pass                        # a full disk must not keep queued mail from leaving; the lock holds without our name

    @staticmethod
    def _is_locked(fd: int) -> bool:
        """False when another process holds the lock."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            return False
        return True

    @staticmethod
    def _is_alive(process: str) -> bool:
        """The clerk of a relay that was killed holds its lock for a moment longer."""
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return False
        except (ValueError, OverflowError, OSError):
            pass                        # no number, or a process that is not ours
        return True

    def _make_folders(self) -> None:
        for folder in (self.incoming, self.done, self.bad):
            os.makedirs(folder, 0o700, exist_ok=True)

    def close(self) -> None:
        for fd in (self.directory, self.lock_fd):
            if fd >= 0:
                os.close(fd)
        self.directory = self.lock_fd = -1

    def sweep(self) -> None:
        """States S1 to S3 and S5 to S7 of the table: nothing in them was acknowledged, or all of it is finished."""
        for folder in (self.incoming, self.done):
            for name in sorted(os.listdir(folder)):
                id, _, kind = name.partition(".")
                if not _ID.fullmatch(id) or kind not in ("eml", "json", "new"):
                    continue            # not ours; people keep odd things everywhere
                try:
                    if kind == "json" and not self._has(self.path, id + ".json"):
                        self._unlink(os.path.join(self.path, id + ".eml"))
                    self._unlink(os.path.join(folder, name))
                except OSError as error:
                    self._note(error)   # a folder of that name, or a disk at fault: no reason not to start

    @staticmethod
    def _has(folder: str, name: str) -> bool:
        return os.path.lexists(os.path.join(folder, name))

    @staticmethod
    def _unlink(path: str) -> None:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass

    @contextlib.contextmanager
    def _durable(self, folder: str) -> Iterator[None]:
        """Names changed within are on stable storage after it.  The directory is
        opened before the first change, because the kernel tells an error once to each
        open file: on a shared one another thread's fsync would swallow ours."""
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield
            os.fsync(fd)
            os.fstat(fd)                # XFS that has shut down after an error lets a folder's fsync pass, and says EIO here
        finally:
            self._close_quietly(fd)     # nothing was written through it

    def _is_here(self) -> bool:
        """Whether the path still leads to the directory that was opened; else it was unmounted or moved away."""
        if self.directory < 0:
            return True
        try:
            found, ours = os.stat(self.path), os.fstat(self.directory)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino)

    # -- accepting

    @staticmethod
    def _write(fd: int, data: bytes) -> None:
        done = os.write(fd, data)
        while done < len(data):         # a short write is not an error, write(2)
            done += os.write(fd, memoryview(data)[done:])

    def _create(self, name: str) -> int:
        """Open an empty file in incoming/: a finished one where there is one.  To make
        and to free an inode costs more than all else that is done to a file, above
        all on ext4 without a journal, which looks past every inode freed in the last minute."""
        path = os.path.join(self.incoming, name)
        with contextlib.suppress(IndexError, FileNotFoundError):
            os.rename(os.path.join(self.done, self.spares.pop()), path)
            return os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def _spare(self, name: str) -> None:
        """A file in done/ is empty from now on, and kept for _create() or gone.
        Only a file as _create() makes it is kept: not one that people linked or copied
        here, nor a large one, which somebody may still be reading block by block."""
        path = os.path.join(self.done, name)
        with contextlib.suppress(FileNotFoundError):
            found = os.lstat(path)
            is_ours = (found.st_mode, found.st_nlink, found.st_uid) == (stat.S_IFREG | 0o600, 1, os.geteuid())
            if not is_ours or found.st_size >= BLOCK_OCTETS or len(self.spares) >= SPARES_MAX:
                return os.unlink(path)
            os.truncate(path, 0)
            self.spares.append(name)

    def append(self, draft: Draft, blocks: List[bytes]) -> None:
        """Part of a message that is still being received.  An error is kept in the draft."""
        try:
            if draft.fd < 0:
                draft.fd = self._create(draft.id + ".eml")
            data = b"".join(blocks)
            self._write(draft.fd, data)
            draft.digest.update(data)
            draft.size += len(data)
        except OSError as error:
            draft.error = error
            self.discard(draft)

    def discard(self, draft: Draft) -> None:
        """Nothing of the draft remains, as far as the disk lets us."""
        files, draft.fd, draft.sidecar_fd = (draft.fd, draft.sidecar_fd), -1, -1
        for fd in files:
            self._close_quietly(fd)
        for name in (draft.id + ".eml", draft.id + ".json"):
            try:
                self._unlink(os.path.join(self.incoming, name))
            except OSError:
                pass                    # the next start removes it

    def commit(self, batch: Sequence[Tuple[Draft, List[bytes], Dict[str, Any]]]) -> List[Optional[OSError]]:
        """Make messages durable: for each the rest of its body and its sidecar
        without size and SHA-256.  Returns for each None, when it is on
        stable storage, or the error, when nothing of it remains.  A file whose
        fsync failed is never fsynced again: after a failure the kernel may
        call lost pages clean.  All of a batch is written before any of it is synced:
        what one fsync has to write, a commit of the journal or a block of
        inodes, then holds the other files' part, too, whose fsync has nothing left to do."""
        results = [self._store(draft, blocks, sidecar) for draft, blocks, sidecar in batch]
        began = time.monotonic()
        results = [self._sync(draft) if result is None else result for result, (draft, _, _) in zip(results, batch)]
        stored = [number for number, result in enumerate(results) if result is None]
        if not stored:
            return results
        ids = {batch[number][0].id for number in stored}
        self.entering.update(ids)
        try:
            if not self._is_here():
                raise OSError(errno.ESTALE, "the spool directory is not the one that was opened")
            with self._durable(self.path):
                for number in stored:
                    results[number] = self._enter(batch[number][0].id)
        except OSError as error:
            self._note(error)
            for number in stored:
                self._withdraw(batch[number][0].id)
                results[number] = results[number] or error
        finally:
            self.entering.difference_update(ids)
        self.fsync_s = (time.monotonic() - began) / (2 * len(stored) + 1)
        return results

    def _store(self, draft: Draft, blocks: List[bytes], sidecar: Dict[str, Any]) -> Optional[OSError]:
        """Body and sidecar in incoming/, on their way to the disk."""
        if draft.error is None:
            self.append(draft, blocks)
        if draft.error is not None:
            self.discard(draft)
            return self._note(draft.error)
        try:
            _start_writing(draft.fd)
            sidecar["size"], sidecar["sha256"] = draft.size, draft.digest.hexdigest()
            draft.sidecar_fd = self._create(draft.id + ".json")
            self._write(draft.sidecar_fd, format_sidecar(sidecar))
            _start_writing(draft.sidecar_fd)
            if self._has(self.path, draft.id + ".json") or self._has(self.path, draft.id + ".eml"):
                raise FileExistsError(errno.EEXIST, "queue ID in use", draft.id)
        except OSError as error:
            self.discard(draft)
            return self._note(error)
        return None

    def _sync(self, draft: Draft) -> Optional[OSError]:
        """State S2."""
        try:
            body, draft.fd = draft.fd, -1
            self._sync_and_close(body)
            sidecar, draft.sidecar_fd = draft.sidecar_fd, -1
            self._sync_and_close(sidecar)
        except OSError as error:
            self.discard(draft)
            return self._note(error)
        return None

    @staticmethod
    def _close_quietly(fd: int) -> None:
        """A file that is given up."""
        try:
            if fd >= 0:
                os.close(fd)
        except OSError:
            pass                        # closed all the same, close(2)

    @staticmethod
    def _sync_and_close(fd: int) -> None:
        try:
            os.fsync(fd)
        finally:
            os.close(fd)                # NFS reports a full disk here

    def _enter(self, id: str) -> Optional[OSError]:
        try:
            os.rename(os.path.join(self.incoming, id + ".eml"), os.path.join(self.path, id + ".eml"))
            os.rename(os.path.join(self.incoming, id + ".json"), os.path.join(self.path, id + ".json"))
        except OSError as error:
            self._withdraw(id)
            return self._note(error)
        return None

    def _withdraw(self, id: str) -> None:
        """Undo an unacknowledged commit, back through S3, so that at no point a
        half stands where it would have to be explained."""
        names = [os.path.join(folder, id + kind) for folder in (self.path, self.incoming) for kind in (".json", ".eml")]
        sidecar, _, back, _ = names
        with contextlib.suppress(OSError):
            os.rename(sidecar, back)
        for name in names:
            if name == sidecar or not os.path.lexists(sidecar):     # else both stay: a second copy, but whole
                with contextlib.suppress(OSError):
                    self._unlink(name)

    def _note(self, error: OSError) -> OSError:
        if error.errno in _SICK:
            self.sick = error.strerror or str(error)
        return error

    def heal(self) -> bool:
        """Whether a probe file survives all that a message goes through; then the spool is well again."""
        path = os.path.join(self.incoming, "probe")
        if not self._is_here():
            return False                # what is there now may be below a mount point: mail must not go there
        try:
            self._make_folders()
            self._unlink(path)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                self._write(fd, b"probe\n" * 1000)
            finally:
                self._sync_and_close(fd)
            with self._durable(self.path):
                os.rename(path, os.path.join(self.path, "probe"))
            with self._durable(self.path):
                os.unlink(os.path.join(self.path, "probe"))
        except OSError:
            return False
        self.sick = ""
        return True

    # -- changing and removing

    def update(self, id: str, change: Callable[[Dict[str, Any]], None]) -> Dict[str, Any]:
        """Apply `change` to a sidecar, durably; returns the new one.  Raises
        Corrupt or OSError, and then the old one or the new one stands, whole."""
        sidecar = self.read_sidecar(id)
        change(sidecar)
        self.replace_sidecar(id, sidecar)
        return sidecar

    def replace_sidecar(self, id: str, sidecar: Dict[str, Any]) -> None:
        self._replace(os.path.join(self.path, id + ".json"), os.path.join(self.incoming, id + ".new"),
                      format_sidecar(sidecar))

    def _replace(self, path: str, temporary: str, data: bytes) -> None:
        try:
            self._unlink(temporary)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                self._write(fd, data)
            except OSError:
                self._close_quietly(fd)
                raise
            self._sync_and_close(fd)
            with self._durable(self.path):
                os.rename(temporary, path)
        except OSError as error:
            try:
                self._unlink(temporary)
            except OSError:
                pass
            raise self._note(error) from None

    def remove(self, ids: Sequence[str]) -> List[Optional[OSError]]:
        """Messages that are finished.  The sidecars leave first and durably (S6),
        so that a power cut brings none back without its body."""
        results: List[Optional[OSError]] = [None] * len(ids)
        try:
            with self._durable(self.path):
                for number, id in enumerate(ids):
                    try:
                        self._move_or_unlink(id + ".json")
                    except OSError as error:
                        results[number] = self._note(error)
        except OSError as error:
            self._note(error)
            return [result or error for result in results]
        for number, id in enumerate(ids):
            if results[number] is None:
                try:
                    self._move_or_unlink(id + ".eml")
                    self._spare(id + ".eml")
                    self._spare(id + ".json")
                except OSError as error:
                    self._note(error)   # out of the queue all the same; the next start sweeps
        return results

    def _move_or_unlink(self, name: str) -> None:
        """A file leaves the queue.  Where done/ is full or gone it goes at once: a
        crash would then leave a body alone (S8), but a delivered message must
        not stay because the disk is full."""
        path = os.path.join(self.path, name)
        try:
            os.rename(path, os.path.join(self.done, name))
        except OSError as error:
            if error.errno != errno.ENOENT and error.errno not in _FULL:
                raise
            self._unlink(path)          # or somebody was quicker with rm

    def set_aside(self, id: str, why: str) -> str:
        """Move what there is of a pair to corrupt/, durably there before it is gone
        here.  Returns the text for the log; raises OSError."""
        moved: List[str] = []
        if not self._is_here():
            raise OSError(errno.ESTALE, "the spool directory is not the one that was opened")
        self._make_folders()            # people tidy up
        with self._durable(self.path), self._durable(self.bad):
            problem = self._move_aside(id, moved)
        self.corrupt_count += bool(moved)
        if problem is not None:
            self._note(problem)
            return "%s: corrupt: %s; and cannot be moved: %s" % (id, why, problem.strerror)
        return "%s: corrupt: %s; moved to corrupt/: %s" % (id, why, " ".join(moved) or "nothing left of it")

    def _move_aside(self, id: str, moved: List[str]) -> Optional[OSError]:
        for kind in (".json", ".eml"):
            target = os.path.join(self.bad, id + kind)
            if os.path.lexists(target):
                target = os.path.join(self.bad, "%s-%s%s" % (id, secrets.token_hex(4), kind))
            try:
                os.rename(os.path.join(self.path, id + kind), target)
                moved.append(id + kind)
            except FileNotFoundError:
                pass
            except OSError as error:
                return error
        return None

    # -- reading

    def _open(self, name: str, what: str) -> Tuple[int, int]:
        """A queued file for reading, and its octets.  Raises Corrupt when it is gone,
        or no file that we may read, and OSError when the disk is at fault."""
        path = os.path.join(self.path, name)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)      # a FIFO would wait for a writer
        except OSError as error:
            if error.errno not in _UNREADABLE:
                raise
            if not self._is_here():
                raise OSError(errno.ESTALE, "the spool directory is not the one that was opened") from None
            raise Corrupt("the %s %s" % (what, "is gone" if error.errno == errno.ENOENT else
                                         "cannot be read: %s" % error.strerror)) from None
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            os.close(fd)
            raise Corrupt("the %s is not a file" % what)
        return fd, found.st_size

    def read_sidecar(self, id: str) -> Dict[str, Any]:
        """Raises Corrupt, or OSError when the disk is at fault."""
        fd, size = self._open(id + ".json", "sidecar")
        try:
            data = read_up_to(fd, min(size, SIDECAR_MAX))
        finally:
            os.close(fd)
        return parse_sidecar(data, id)

    def peek_sidecar(self, id: str) -> Dict[str, Any]:
        """For lists of what the relay has read and checked before: as it stands, and
        quickly.  Raises Corrupt or OSError when there is none to be had."""
        fd = os.open("%s/%s.json" % (self.path, id), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            data = os.read(fd, PEEK_OCTETS)
            if len(data) == PEEK_OCTETS:
                data += read_up_to(fd, SIDECAR_MAX)
        finally:
            os.close(fd)
        try:
            return dict(json.loads(data.decode("utf-8")))       # ours is ASCII; people's jq writes UTF-8
        except (ValueError, TypeError):
            raise Corrupt("the sidecar cannot be read") from None

    def check_body(self, id: str, sidecar: Mapping[str, Any]) -> None:
        """A quick look for the start; the SHA-256 is compared before each delivery.  Raises Corrupt or OSError."""
        fd, size = self._open(id + ".eml", "body")
        os.close(fd)
        if size != sidecar["size"]:
            raise Corrupt("the body has %d octets, not %d" % (size, sidecar["size"]))

    def is_young(self, id: str) -> bool:
        """Whether a pair changed a moment ago, so that what it lacks may be on its way."""
        for kind in (".json", ".eml"):
            try:
                if 0 <= time.time() - os.stat(os.path.join(self.path, id + kind)).st_ctime < COPY_S:
                    return True         # ctime: cp -p and rsync set the other one back
            except OSError:
                pass                    # the other half decides
        return False

    def has_sidecar(self, id: str) -> bool:
        return self._has(self.path, id + ".json")

    def read_message(self, id: str, sidecar: Mapping[str, Any]) -> "Message":
        """The body, verified against the sidecar's SHA-256; raises Corrupt or
        OSError.  A large one is verified now and read again block by block."""
        message = Message(*self._open(id + ".eml", "body"))
        try:
            digest = hashlib.sha256()
            size = 0
            for block in message.blocks():
                digest.update(block)
                size += len(block)
            if size != sidecar["size"] or digest.hexdigest() != sidecar["sha256"]:
                raise Corrupt("the body does not match its SHA-256")
        except BaseException:
            message.close()
            raise
        return message

    def read_header(self, id: str, longest: int = HEADER_SCAN_MAX) -> bytes:
        """The message up to and without the first empty line.  Raises Corrupt or OSError."""
        fd, _ = self._open(id + ".eml", "body")
        try:
            data = read_up_to(fd, longest)
        finally:
            os.close(fd)
        return data.partition(b"\r\n\r\n")[0] + b"\r\n"

    def names(self, orphans: Optional[List[str]] = None) -> Iterator[str]:
        """IDs with a sidecar, in no order.  Lone bodies older than an hour are collected in `orphans`."""
        with os.scandir(self.path) as entries:
            for entry in entries:
                id, _, kind = entry.name.partition(".")
                if id in self.entering:
                    continue            # its client may yet be told that it was not kept
                if kind == "json" and _ID.fullmatch(id):
                    yield id
                elif kind == "eml" and orphans is not None and _ID.fullmatch(id) and not self._has(self.path, id + ".json"):
                    try:
                        if time.time() - entry.stat().st_mtime > ORPHAN_S:
                            orphans.append(id)
                    except OSError:
                        pass            # just committed, or just removed

    def free(self) -> int:
        """Octets an unprivileged writer may still use; 0 when the file system cannot say or has no inodes left."""
        try:
            found = os.statvfs(self.path)
        except OSError:
            return 0
        return found.f_bavail * found.f_frsize if found.f_favail > 100 or not found.f_files else 0

    def remove_control(self) -> None:
        """The control socket of a relay that is gone; we hold the lock, so it is not in use."""
        self._unlink(os.path.join(self.path, "control"))

    # -- what is known of the primaries

    def load_state(self, name: str = "state.json") -> Dict[str, Any]:
        """An unreadable state file costs only what was learned."""
        try:
            fd, size = self._open(name, "state")
            try:
                state = json.loads(read_up_to(fd, min(size, STATE_MAX)))
            finally:
                os.close(fd)
            return state if isinstance(state, dict) else {}
        except (Corrupt, OSError, ValueError, RecursionError):
            return {}

    def save_state(self, state: Mapping[str, Any], recipients: Optional[Mapping[str, Any]] = None, number: int = 0) -> None:
        """In one committer at a time.  `number` grows from save to save: several are
        under way at once, and what is older than the last one written is not written."""
        with self.state_lock:
            for name, values in (("state", state), ("recipients", recipients)):
                if values is not None and number >= self.saved.get(name, 0):
                    self._replace(os.path.join(self.path, name + ".json"), os.path.join(self.path, name + ".new"),
                                  json.dumps(values, indent=1, sort_keys=True).encode("ascii") + b"\n")
                    self.saved[name] = number

    def save_history(self, history: Mapping[str, Any]) -> None:
        """What the status page draws; short, because it is written again and again."""
        with self.state_lock:
            self._replace(os.path.join(self.path, "history.json"), os.path.join(self.path, "history.new"),
                          json.dumps(history, separators=(",", ":"), sort_keys=True).encode("ascii") + b"\n")


def _start_writing(fd: int) -> None:
    """The kernel begins to write the file, and an fsync that comes later has less
    to wait for: what Linux makes of this advice, fadvise64(2).  Nothing depends on it."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


class Message:
    """An open body.  Small ones are read once and kept, so that verifying and sending share the read."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size
        self.whole: Optional[bytes] = None

    def blocks(self) -> Iterator[bytes]:
        if self.whole is not None:
            yield self.whole
            return
        if self.size < BLOCK_OCTETS:
            self.whole = read_up_to(self.fd, self.size)
            yield self.whole
            return
        os.lseek(self.fd, 0, os.SEEK_SET)
        while True:
            block = os.read(self.fd, BLOCK_OCTETS)
            if not block:
                return
            yield block

    def close(self) -> None:
        os.close(self.fd)


def read_up_to(fd: int, most: int) -> bytes:
    """The file, or its first `most` octets; a short read is not its end on every file system."""
    blocks, left = [], most
    while left > 0:
        block = os.read(fd, min(left, BLOCK_OCTETS))
        if not block:
            break
        blocks.append(block)
        left -= len(block)
    return b"".join(blocks)


QUEUED, DELIVERED, BOUNCED, EXPIRED, DELETED = "queued", "delivered", "bounced", "expired", "deleted"


def format_sidecar(sidecar: Mapping[str, Any]) -> bytes:
    return json.dumps(sidecar, separators=(",", ":")).encode("ascii") + b"\n"


def parse_sidecar(data: bytes, id: str) -> Dict[str, Any]:
    """Checks all that the relay relies on, so that nothing later raises;
    addresses go through the same grammar as on the wire.  Raises Corrupt."""
    try:
        sidecar = json.loads(data)
        if sidecar["format"] != FORMAT:
            raise Corrupt("the sidecar has format %s, this version reads %d" % (printable(str(sidecar["format"]), 20), FORMAT))
        if sidecar["id"] != id:
            raise Corrupt("the sidecar is of another message")
        people, client, held = sidecar["recipients"], sidecar["client"], sidecar["held"]
        texts = [sidecar[key] for key in ("sender", "sha256", "ret", "envid", "kind", "body")]
        texts += [client["address"], client["helo"], "" if client["tls"] is None else client["tls"]] + held
        counts, times = [sidecar["size"]], [sidecar["received"]]
        for one in people:
            texts += [one[key] for key in ("address", "domain", "state", "notify", "orcpt", "last_response", "last_status",
                                           "last_remote")]
            counts.append(one["attempts"])
            times += [one["next_attempt"], one["expires"]]
            times += [one[key] for key in ("last_attempt", "refused_since") if one[key] is not None]
            path, rest = parse_path("<%s>" % one["address"], "5.1.3")
            if rest or not path.domain or path.domain != one["domain"]:
                raise Corrupt("the sidecar's recipient %s is not an address" % printable(one["address"], 100))
        if not (people and _are_texts(texts) and all(type(one) is int and 0 <= one < 1 << 62 for one in counts)
                and all(type(one) in (int, float) and 0 <= one < TIME_MAX for one in times)     # no NaN, no flag
                and all(one["state"] in (QUEUED, DELIVERED, BOUNCED, EXPIRED, DELETED) for one in people)
                and type(sidecar["smtputf8"]) is bool and re.fullmatch("[0-9a-f]{64}", sidecar["sha256"])
                and sidecar["kind"] in ("mail", "notice", "alert") and not parse_path("<%s>" % sidecar["sender"], "5.1.7")[1]):
            raise Corrupt("the sidecar does not make sense")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, Refuse) as error:
        raise Corrupt("the sidecar cannot be read: %s" % printable(repr(error), 200)) from None
    return dict(sidecar)


def _are_texts(values: Sequence[Any]) -> bool:
    """Whether these are strings that can be sent: no controls, and no lone surrogates (then it raises ValueError)."""
    return all(isinstance(one, str) for one in values) and not CONTROLS.search("".join(values).encode("utf-8"))


COUNTERS = {QUEUED: "deferred", DELIVERED: "delivered", BOUNCED: "bounced", EXPIRED: "expired", "": "accepted"}


def make_sidecar(id: str, kind: str, sender: str, recipients: Iterable[Tuple[str, str, str, str, Time]], now: Time,
                 client: Mapping[str, Optional[str]], body: str = "", smtputf8: bool = False, ret: str = "",
                 envid: str = "", held: Sequence[str] = ()) -> Dict[str, Any]:
    """`recipients`: (address, domain, NOTIFY, ORCPT, expires).  `kind` is mail or notice."""
    return {"format": FORMAT, "id": id, "kind": kind, "received": now, "size": 0, "sha256": "", "sender": sender,
            "client": dict(client), "body": body, "smtputf8": smtputf8, "ret": ret, "envid": envid, "held": list(held),
            "recipients": [{"address": address, "domain": domain, "state": QUEUED, "attempts": 0, "next_attempt": now,
                            "expires": expires, "last_attempt": None, "last_status": "", "last_response": "", "last_remote": "",
                            "refused_since": None, "notify": notify, "orcpt": orcpt}
                           for address, domain, notify, orcpt, expires in recipients]}


def disk_reply(error: Optional[OSError]) -> Reply:
    """What a client hears when its message could not be kept: always temporary, and nothing of it remains."""
    if error is not None and error.errno in _FULL:
        return Reply(452, "4.3.1", "Insufficient system storage")
    return Reply(451, "4.3.0", "Local error in processing, try again later")


class Commit(NamedTuple):
    draft: Draft
    blocks: List[bytes]
    sidecar: Dict[str, Any]


class Remove(NamedTuple):
    id: str


class Task(NamedTuple):
    run: Callable[[Spool], Any]


Work = Union[Commit, Remove, Task]
Done = Callable[[Any], None]    # called by the loop with None, a result, or the exception


class Clerk:
    """A process of our own that stores and removes small messages, with
    Spool's methods for it.  A thread gives the interpreter's lock away with each
    system call and fights the loop to have it back, which costs more than the
    call; a clerk has an interpreter to itself, and gets a whole batch in
    one call.  It holds the spool's lock, too, so that no other relay starts before it has ended.
    What it cannot do, and all that it was doing when it died, is done by the spool here."""

    def __init__(self, spool: Spool, settle: Callable[[], None]) -> None:
        """Forks, so there must be no threads yet.  `settle` is called in the new process first.  Raises OSError."""
        self.spool = spool
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # who is ignored when it ends has a number that others may get
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self.process = os.fork()
            if not self.process:
                self._live(ours, theirs, settle)
            self.stream = ours.makefile("rwb")

    def commit(self, batch: Sequence[Commit]) -> List[Optional[OSError]]:
        """As Spool.commit()."""
        small = [one for one in batch if one.draft.fd < 0 and one.draft.error is None
                 and sum(map(len, one.blocks)) <= CLERK_OCTETS]
        ids = {one.draft.id for one in small}
        self.spool.entering.update(ids)
        try:
            answers = self._ask(("commit", [(one.draft.id, one.blocks, one.sidecar) for one in small]))
            for one, (_, size, digest) in zip(small, answers or ()):
                one.sidecar["size"], one.sidecar["sha256"] = size, digest
            if answers is None:         # how far it came nobody knows
                for id in ids:
                    self.spool._withdraw(id)
                return self.spool.commit(batch)
        finally:
            self.spool.entering.difference_update(ids)
        errors = {one.draft.id: error and OSError(*error) for one, (error, _, _) in zip(small, answers)}
        others = [one for one in batch if one.draft.id not in ids]
        errors.update(zip([one.draft.id for one in others], self.spool.commit(others)))
        return [errors[one.draft.id] for one in batch]

    def remove(self, ids: Sequence[str]) -> List[Optional[OSError]]:
        """As Spool.remove()."""
        errors = self._ask(("remove", list(ids)))
        return self.spool.remove(ids) if errors is None else [error and OSError(*error) for error in errors]

    def end(self) -> None:
        """At once, also where it was stopped: it has nothing to do, or must not go on."""
        with contextlib.suppress(OSError):
            self.stream.close()
        if self.process:
            with contextlib.suppress(PermissionError):      # it ended before it became `user`
                os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
        self.process = 0

    def _ask(self, request: Tuple[str, List[Any]]) -> Any:
        """None when the clerk is no more."""
        if not self.process:
            return None
        try:
            self._write(request)
            answer, sick, self.spool.fsync_s = self._read()
        except Exception:               # whatever it was: an answer that is yet to come would be taken for the next one
            self.end()
            return None
        self.spool.sick = sick or self.spool.sick
        return answer

    def _write(self, value: Any) -> None:
        data = marshal.dumps(value)
        self.stream.write(struct.pack("=I", len(data)) + data)
        self.stream.flush()

    def _read(self) -> Any:
        """Raises EOFError when the other end is closed."""
        head = self.stream.read(4)
        data = self.stream.read(struct.unpack("=I", head)[0]) if len(head) == 4 else b""
        return marshal.loads(data)

    # -- in the process

    def _live(self, relay: socket.socket, ours: socket.socket, settle: Callable[[], None]) -> None:
        """Signals are for the relay; the end of its requests is the end of this.  Never
        returns: there is one relay, and its code goes on in the other process."""
        status = 1
        try:
            relay.close()
            self.stream = ours.makefile("rwb")
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN)
            settle()
            while True:
                self._write(self._serve(*self._read()))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            status = 0
        except BaseException:
            traceback.print_exc()       # to the relay's standard error; the relay does it again, and tells
            sys.stderr.flush()
        finally:
            os._exit(status)

    def _serve(self, what: str, values: List[Any]) -> Tuple[List[Any], str, float]:
        answer: List[Any]
        if what == "commit":
            batch = [(Draft(id), blocks, sidecar) for id, blocks, sidecar in values]
            errors = self.spool.commit(batch)
            answer = [(error and error.args[:2], sidecar["size"], sidecar["sha256"])
                      for error, (_, _, sidecar) in zip(errors, batch)]
        else:
            answer = [error and error.args[:2] for error in self.spool.remove(values)]
        sick, self.spool.sick = self.spool.sick, ""         # it is the relay that heals
        return answer, sick, self.spool.fsync_s


class Committers:
    """Threads that do all writing.  As many batches are under way as the disk is
    slow: where an fsync is quick, one, which is the clerk's, while the next one grows;
    where it is slow, many fsyncs are under way at once, and the kernel merges
    them into few journal commits.  Tasks have a thread more, so that one that takes long holds no mail up."""

    def __init__(self, spool: Spool, post: Callable[[List[Tuple[Done, Any]]], None], on_lost: Done = lambda _: None) -> None:
        """`on_lost`: the clerk has died."""
        self.spool = spool
        self.post = post
        self.on_lost = on_lost
        self.clerk: Optional[Clerk] = None      # that has nothing to do
        self.lent: Optional[Clerk] = None       # ... or the same, that has
        self.messages: Deque[Tuple[Work, Done]] = collections.deque()
        self.tasks: Deque[Tuple[Work, Done]] = collections.deque()
        self.condition = threading.Condition()
        self.writing = 0                # threads that have messages
        self.tasking = 0                # ... and a task
        self.idle = 0                   # ... and nothing
        self.done = 0                   # batches and tasks that have ended
        # What an fsync took in the last batches; the least of them, because a busy processor
        # makes others look slow.  The first is a guess between a card and an SSD.
        self.fsyncs_s: Deque[float] = collections.deque([16 * FAST_FSYNC_S], maxlen=16)
        self.stopping = False
        self.threads: List[threading.Thread] = []

    @property
    def width(self) -> int:
        """How many batches may be under way at once."""
        return max(1, min(COMMITTERS_MAX, int(min(self.fsyncs_s) / FAST_FSYNC_S)))

    def submit(self, work: Work, done: Done) -> None:
        with self.condition:
            if isinstance(work, Task):
                self.tasks.append((work, done))
                is_free = self.tasking <= self.width
            else:
                self.messages.append((work, done))
                is_free = self.writing < self.width
            if is_free and self.idle:
                self.idle -= 1          # by us, because it wakes up later: the next one is not for it
                self.condition.notify()
            elif is_free and len(self.threads) <= 2 * self.width:
                self._grow()

    def _grow(self) -> None:
        thread = threading.Thread(target=self._run, name="committer", daemon=True)
        try:
            thread.start()
            self.threads.append(thread)
        except RuntimeError:            # no more threads: those there are do it
            if not self.threads:
                raise

    def stop(self, seconds: float = 86400.0) -> bool:
        """Returns when all that was submitted is done, or when none of it was for so many seconds; whether it is done."""
        with self.condition:
            self.stopping = True
            self.idle = 0
            self.condition.notify_all()
        if not self._join(seconds):
            if self.lent is not None and self.lent.process:     # or its standstill would outlive us, with the spool's lock
                with contextlib.suppress(OSError):
                    os.kill(self.lent.process, signal.SIGKILL)
            return self._join(seconds / 2)
        if self.clerk is not None:
            self.clerk.end()
        return True

    def _join(self, seconds: float) -> bool:
        """False when there is still work to do, and none of it was done for so many seconds."""
        done, since = self.done, time.monotonic()
        for thread in self.threads:
            while thread.is_alive():
                if done != self.done:
                    done, since = self.done, time.monotonic()
                left = since + seconds - time.monotonic()
                if left <= 0:
                    return False
                thread.join(min(left, STOP_POLL_S))
        return True

    def _run(self) -> None:
        while True:
            batch = self._take()
            if not batch:
                return
            done = self._work(batch)
            self._end(batch)
            self.post(done)

    def _take(self) -> List[Tuple[Work, Done]]:
        """One task, or a share of the messages; nothing at the end."""
        with self.condition:
            while True:
                if self.messages and (self.writing < self.width or self.stopping):
                    self.writing += 1
                    share = min(BATCH_MAX, -(-len(self.messages) // self.width))
                    return [self.messages.popleft() for _ in range(share)]
                if self.tasks and (self.tasking <= self.width or self.stopping):
                    self.tasking += 1
                    return [self.tasks.popleft()]
                if self.stopping:
                    return []
                self.idle += 1
                self.condition.wait()

    def _end(self, batch: Sequence[Tuple[Work, Done]]) -> None:
        with self.condition:
            self.done += 1
            if isinstance(batch[0][0], Task):
                self.tasking -= 1
            else:
                self.writing -= 1
            if any(isinstance(work, Commit) for work, _ in batch):
                self.fsyncs_s.append(self.spool.fsync_s)

    def _work(self, batch: Sequence[Tuple[Work, Done]]) -> List[Tuple[Done, Any]]:
        work, done = batch[0]
        if isinstance(work, Task):
            try:
                return [(done, work.run(self.spool))]
            except Exception as error:
                return [(done, error)]
        out: List[Tuple[Done, Any]] = []
        commits = [(work, done) for work, done in batch if isinstance(work, Commit)]
        removals = [(work, done) for work, done in batch if isinstance(work, Remove)]
        try:
            with self._hands() as hands:
                if commits:
                    out.extend(zip((done for _, done in commits), hands.commit([work for work, _ in commits])))
                if removals:
                    out.extend(zip((done for _, done in removals), hands.remove([work.id for work, _ in removals])))
        except Exception as error:      # a bug: everybody in this batch hears of it, none is told "done"
            told = len(out)
            out.extend((done, error) for _, done in (commits + removals)[told:])
        return out

    @contextlib.contextmanager
    def _hands(self) -> Iterator[Union[Spool, Clerk]]:
        """The clerk, when it has nothing to do; else the spool itself."""
        with self.condition:
            clerk, self.clerk = self.clerk, None
            self.lent = clerk or self.lent
        try:
            yield clerk or self.spool
        finally:
            if clerk is not None:
                self.lent = None
            if clerk is not None and clerk.process:
                self.clerk = clerk
            elif clerk is not None:
                self.post([(self.on_lost, None)])


# == 7. SESSION ================================================================
# One client's SMTP dialogue: bytes in, actions out; no socket, no clock, no file.
# After Ask it waits for resume(answer) and keeps later input in its buffer.

class Send(NamedTuple):
    data: bytes


class Body(NamedTuple):
    """Octets of a message, as they will be kept; the session may have done with its transaction by now."""
    data: bytes
    transaction: "Transaction"


class Discard(NamedTuple):
    """Throw away what came as Body."""


class Note(NamedTuple):
    """A line for the log."""
    text: str


class Ask(NamedTuple):
    """A question for the server: mail, rcpt, commit, challenge, login, etrn or atrn; answered by resume()."""
    what: str
    value: Any


class Reverse(NamedTuple):
    """ATRN was granted: after everything sent so far the client is the server
    (RFC 2645 5.2.1), and what it has sent of its part already is `early`.  The session is over."""
    early: bytes


class Close(NamedTuple):
    """After everything sent so far has gone out.  `at_once`: the client has
    said QUIT, so that nothing of its can be under way that would reset our last reply."""
    at_once: bool = False


Action = Union[Send, Body, Discard, Note, Ask, Reverse, Close]


class Recipient(NamedTuple):
    path: Path
    notify: str
    orcpt: str

    @property
    def address(self) -> str:
        return str(self.path)


class Hops:
    """Counts Received fields as the header passes by, and keeps no more of it
    than the field it is in: a thousand endless headers take no memory."""
    __slots__ = ("line", "field", "left", "fields", "names")

    def __init__(self) -> None:
        self.line = b""                 # not ended yet
        self.field = b""                # unfolded
        self.left = HEADER_SCAN_MAX
        self.fields = 0
        self.names: List[bytes] = []    # those after `by`, RFC 5321 4.4

    def feed(self, data: bytes) -> bool:
        """Part of the message, its newlines mended.  True when the header is over."""
        *lines, rest = (self.line + data[:self.left]).split(b"\r\n")
        self.left -= len(data)
        for line in lines:
            if not line:
                return True
            if line[:1] not in (b" ", b"\t"):
                self.end_field()
            self.field = (self.field + line)[:HEADER_FIELD_KEPT]
        self.line = rest[:HEADER_FIELD_KEPT] + (b"\r" if rest[HEADER_FIELD_KEPT:].endswith(b"\r") else b"")
        return self.left <= 0

    def end_field(self) -> None:
        if self.field[:9].lower() == b"received:":
            self.fields += 1
            self.names += [name.lower().rstrip(b".") for name in BY.findall(self.field)[:1]]
        self.field = b""


class Transaction:
    """One message being given to us; the session outlives many."""
    __slots__ = ("sender", "size", "body", "smtputf8", "ret", "envid", "recipients", "refused", "octets", "received", "hops",
                 "rcpt_refused")

    def __init__(self, sender: str, size: int, body: str, smtputf8: bool, ret: str, envid: str) -> None:
        self.sender = sender
        self.size = size                        # as declared, 0 when not
        self.body = body
        self.smtputf8 = smtputf8
        self.ret = ret
        self.envid = envid
        self.recipients: List[Recipient] = []
        self.rcpt_refused = False
        self.refused: Optional[Reply] = None    # the answer its end of data will get
        self.octets = 0                         # of the message
        self.received = 0                       # ... and as they came, with dots and NULs that are not kept
        self.hops: Optional[Hops] = Hops()      # None when the header is over


class Login(NamedTuple):
    """What a client says to be somebody."""
    mechanism: str
    username: str
    challenge: bytes            # ours, for CRAM-MD5
    proof: bytes                # the digest in hex, or the password itself

    def is_right(self, password: str) -> bool:
        """RFC 2195 2, RFC 4616 2; takes the same time whatever is wrong.  Raises ValueError on a
        machine whose policy forbids MD5."""
        right, proof = password.encode("utf-8"), self.proof
        if self.mechanism == "CRAM-MD5":
            right = hmac.new(right, self.challenge, "md5").hexdigest().encode("ascii")
        return hmac.compare_digest(hashlib.sha256(right).digest(), hashlib.sha256(proof).digest())


def parse_cram(response: bytes, challenge: bytes) -> Optional[Login]:
    """`name SP digest`, RFC 2195 2; None when it is not that.  The name may have blanks."""
    name, blank, digest = response.rpartition(b" ")
    return make_login("CRAM-MD5", name, challenge, digest.lower()) if blank else None


def parse_plain(response: bytes) -> Optional[Login]:
    """`[identity] NUL name NUL password`, RFC 4616 2.  Nobody may act as another."""
    parts = response.split(b"\0")
    return make_login("PLAIN", parts[1], b"", parts[2]) if len(parts) == 3 and parts[0] in (b"", parts[1]) else None


def make_login(mechanism: str, name: bytes, challenge: bytes, proof: bytes) -> Optional[Login]:
    try:
        return Login(mechanism, name.decode("utf-8"), challenge, proof) if len(name) <= LOGIN_MAX else None
    except UnicodeDecodeError:
        return None


class DataReader:
    """DATA's dot transparency, RFC 5321 4.5.2.  Nothing but CRLF . CRLF ends
    the data; the dialogue begins at a line start."""
    __slots__ = ("held", "first")
    END = b"\r\n.\r\n"

    def __init__(self) -> None:
        self.held = b"\r\n"             # a virtual line end, so that a first line of "." is an end too
        self.first = True

    def feed(self, data: bytes) -> Tuple[bytes, Optional[bytes]]:
        """Returns the unstuffed octets and, at the end, what follows it; else None."""
        data = self.held + data
        end = data.find(self.END)
        rest = None
        if end >= 0:
            data, rest = data[:end + 2], data[end + 5:]
        else:
            keep = next((n for n in (4, 3, 2, 1) if data.endswith(self.END[:n])), 0)
            self.held = data[len(data) - keep:]
            data = data[:len(data) - keep]
        if self.first and len(data) >= 2:
            # The virtual line end is still in front, so a dot that opens the mail is unstuffed with the rest.
            data, self.first = data.replace(b"\r\n.", b"\r\n")[2:], False
            return data, rest
        return data.replace(b"\r\n.", b"\r\n"), rest


class Newlines:
    """Mends what must never be sent on: NUL goes first, then a bare LF becomes CRLF and a bare CR a space."""
    __slots__ = ("cr", "found", "open")
    _STRAY = re.compile(rb"\r(?!\n)|(?<!\r)\n")

    def __init__(self) -> None:
        self.cr = b""                   # a final CR waits for its LF
        self.found = False
        self.open = False               # the last line has no end yet

    def feed(self, data: bytes, last: bool = False) -> bytes:
        """`last`: no more comes; a line left open, as BDAT may leave one, is ended."""
        data = self._mend(data, last)
        if data:
            self.open = not data.endswith(b"\r\n")
        return data + b"\r\n" if last and self.open else data

    def _mend(self, data: bytes, last: bool) -> bytes:
        if b"\0" in data:
            data = data.replace(b"\0", b"")
            self.found = True
        if self.cr:
            data, self.cr = self.cr + data, b""
        if data.endswith(b"\r") and not last:
            data, self.cr = data[:-1], b"\r"
        pairs = data.count(b"\r\n")
        if data.count(b"\n") == pairs and data.count(b"\r") == pairs:
            return data
        self.found = True
        return self._STRAY.sub(lambda m: b" " if m.group() == b"\r" else b"\r\n", data)


class Mode(enum.Enum):
    COMMAND = 1
    DATA = 2
    CHUNK = 3
    TLS = 4                     # the handshake is the server's
    CLOSED = 5


class Stage(enum.Enum):
    """How far a dialogue has come; which command is legal where is in COMMANDS."""
    START = "send HELO or EHLO first"
    READY = "need MAIL command"
    MAIL = "need RCPT command"
    RCPT = "MAIL transaction in progress"
    CHUNKS = "BDAT in progress"


@dataclasses.dataclass
class Door:
    """What the server lets sessions know: replaced at SIGHUP, read by all."""
    cfg: Config
    size_limit: int                 # octets, 0 for none
    has_tls: bool = False


def too_big(limit: int) -> Reply:
    return Reply(552, "5.3.4", "Message size exceeds the limit of %d octets" % limit)


BY = re.compile(rb"(?:^|\s)by\s+([^\s;()]+)", re.I)
HTTP = frozenset(b"GET POST PUT HEAD CONNECT OPTIONS DELETE PATCH TRACE".split())


class Session:
    """The dialogue with one client.  receive() and resume() return actions in
    the order in which they must take effect."""

    def __init__(self, door: Door, address: str, name: str = "unknown", is_odmr: bool = False) -> None:
        self.door = door
        self.is_odmr = is_odmr          # on a port of odmr_listen
        self.cfg = door.cfg
        self.address = address
        self.name = name
        self.helo = ""
        self.esmtp = False
        self.tls: Optional[str] = None  # protocol version, TLSv1.3
        self.cipher = ""
        self.stage = Stage.START
        self.mode = Mode.COMMAND
        self.transaction: Optional[Transaction] = None
        self.errors = 0
        self.username = ""              # who it has proved to be, by AUTH
        self.failed_logins = 0
        self.exchange: Optional[Callable[[bytes], None]] = None     # what takes the next line, within AUTH
        self.buffer = bytearray()
        self.skipping = False           # within a command line that is too long
        self.waiting: Optional[Callable[[Any], None]] = None
        self.reader = DataReader()
        self.newlines = Newlines()
        self.chunk_left = 0             # octets of the present BDAT chunk
        self.chunk_last = False
        self.chunk_refused: Optional[Reply] = None
        self.out: List[Action] = []

    # -- the outside

    def greet(self) -> List[Action]:
        return self._act(lambda: self.send(Reply(220, "", "%s ESMTP etrn_relay" % self.cfg.hostname)))

    def receive(self, data: bytes) -> List[Action]:
        self.buffer += data
        return self._act(self._run)

    def resume(self, answer: Any) -> List[Action]:
        handler, self.waiting = self.waiting, None
        assert handler is not None
        handler(answer)
        return self._act(self._run)

    def shut(self, reply: Reply) -> List[Action]:
        """The server ends the session: timeout, shutdown, a bug."""
        self.mode = Mode.CLOSED
        return self._act(lambda: self.send(reply, close=True))

    @property
    def is_idle(self) -> bool:
        """Between transactions: nothing would be lost by ending here."""
        return self.transaction is None and self.waiting is None

    def _act(self, step: Callable[[], None]) -> List[Action]:
        step()
        out, self.out = self.out, []
        return out

    def send(self, reply: Reply, close: bool = False, at_once: bool = False) -> None:
        self.out.append(Send(reply.wire()))
        if close:
            self.out.append(Close(at_once))
            self.mode = Mode.CLOSED

    def ask(self, what: str, value: Any, then: Callable[[Any], None]) -> None:
        self.waiting = then
        self.out.append(Ask(what, value))

    # -- reading

    def _run(self) -> None:
        while self.buffer and self.waiting is None and self.mode is not Mode.CLOSED:
            if self.mode is Mode.DATA:
                self._read_data()
            elif self.mode is Mode.CHUNK:
                self._read_chunk()
            elif not self._read_commands():
                return
        if self.mode is Mode.CLOSED:
            self.buffer.clear()

    def _read_commands(self) -> bool:
        """Run the complete lines in the buffer; False when more input is needed."""
        position = 0
        while self.waiting is None and self.mode is Mode.COMMAND:
            end = self.buffer.find(b"\n", position)
            if end < 0:
                break
            line = bytes(self.buffer[position:end])
            position = end + 1
            if self.skipping:
                self.skipping = False
            elif len(line) >= COMMAND_MAX:
                self._fail_long_line()
            else:
                self._command(line[:-1] if line.endswith(b"\r") else line)
        del self.buffer[:position]
        if self.mode is Mode.TLS and self.waiting is None:
            self._begin_tls()
        if position or self.mode is not Mode.COMMAND or self.waiting is not None:
            return True
        if len(self.buffer) >= COMMAND_MAX or self.skipping:
            self.buffer.clear()
            if not self.skipping:
                self.skipping = True    # to the next line end; memory stays flat
                self._fail_long_line()
        return False

    def _fail_long_line(self) -> None:
        within_auth, self.exchange = self.exchange is not None, None
        self.fail(Reply(500, "5.5.6" if within_auth else "5.5.2", "Line too long"))     # RFC 4954 6

    def _read_data(self) -> None:
        data, rest = self.reader.feed(bytes(self.buffer))
        self.buffer.clear()
        self._keep(self.newlines.feed(data, last=rest is not None), len(data))
        if rest is not None and self.mode is Mode.DATA:
            self.buffer += rest
            self.mode = Mode.COMMAND
            self._end_of_data()

    def _read_chunk(self) -> None:
        data = bytes(self.buffer[:self.chunk_left])
        del self.buffer[:self.chunk_left]
        self.chunk_left -= len(data)
        if self.chunk_refused is None:
            self._keep(self.newlines.feed(data), len(data))
        if not self.chunk_left:
            self._end_of_chunk()

    def _keep(self, data: bytes, received: int) -> None:
        """Body octets: counted, searched for hops, passed on."""
        transaction = self.transaction
        assert transaction is not None
        transaction.octets += len(data)
        transaction.received += received
        limit = self.door.size_limit
        if limit and transaction.octets > limit and transaction.refused is None:
            self._refuse(transaction, too_big(limit))
        if limit and transaction.received > limit * OVERSIZE_FACTOR + RECEIVE_OCTETS:
            return self.send(transaction.refused or too_big(limit), close=True)
        if transaction.hops is not None and transaction.hops.feed(data):
            self._count_hops(transaction, transaction.hops)
        if data and transaction.refused is None:
            self.out.append(Body(data, transaction))

    def _count_hops(self, transaction: Transaction, hops: Hops) -> None:
        """RFC 5321 6.3.  What came before our own field counts; our name only as a whole `by` name."""
        transaction.hops = None
        hops.end_field()
        ours = hops.names.count(self.cfg.hostname.encode("ascii"))
        if hops.fields >= HOPS_MAX or ours >= OWN_HOPS_MAX:
            self._refuse(transaction, Reply(554, "5.4.6", "Too many hops: %d Received fields, %d of them ours"
                                            % (hops.fields, ours)))

    def _refuse(self, transaction: Transaction, reply: Reply) -> None:
        if transaction.refused is None:
            transaction.refused = reply
            self.out.append(Discard())

    # -- commands

    def _command(self, line: bytes) -> None:
        if self.exchange is not None:
            return self._continue_auth(line)
        verb, _, argument = line.strip(b" ").partition(b" ")
        verb = verb.upper()
        if verb in HTTP:
            self.note_reject(verb.decode("ascii"), Reply(521, "5.5.1", "This is a mail server"), "")
            return self.send(Reply(521, "5.5.1", "This is a mail server"), close=True)
        if CONTROLS.search(line):
            return self.fail(Reply(500, "5.5.2", "Control characters in a command"))
        if self.is_odmr and verb not in ODMR_COMMANDS:
            return self.fail(Reply(502, "5.5.1", "Not on this port, which is for on-demand mail relay"))    # RFC 2645 5.3
        known = COMMANDS.get(verb)
        if known is None:
            return self.fail(Reply(500, "5.5.2", "Command unrecognized"))
        handler, legal = known
        try:
            text = argument.strip(b" ").decode("utf-8")
            if self.stage not in legal:
                raise self._out_of_order()
            handler(self, text)
        except UnicodeDecodeError:
            self.fail(Reply(501, "5.5.4", "Not UTF-8"))
        except Refuse as refusal:
            self.fail(refusal.reply)

    def _out_of_order(self) -> Refuse:
        return Refuse(503, "5.5.1", "Bad sequence of commands: %s" % self.stage.value)

    def fail(self, reply: Reply) -> None:
        """A protocol error; refused recipients and messages do not come here."""
        self.errors += 1
        if self.errors > ERRORS_MAX:
            self.out.append(Note("too many errors after %s from %s" % (self.stage.name, format_peer(self.address, self.name))))
            self.send(Reply(421, "4.7.0", "%s Error: too many errors" % self.cfg.hostname), close=True)
        else:
            self.send(reply)

    def note_reject(self, command: str, reply: Reply, details: str) -> None:
        self.out.append(Note("NOQUEUE: reject: %s from %s: %s;%s proto=%s helo=<%s>" % (
            command, format_peer(self.address, self.name), printable(str(reply)), details,
            "ESMTP" if self.esmtp else "SMTP", printable(self.helo, 100))))

    def reset(self) -> None:
        if self.transaction is not None:
            self.transaction = None
            self.out.append(Discard())
        if self.stage is not Stage.START:
            self.stage = Stage.READY

    def do_helo(self, text: str) -> None:
        if not text:
            raise Refuse(501, "5.5.4", "Syntax: HELO hostname")
        self.reset()
        self.helo, self.esmtp, self.stage = text, False, Stage.READY
        self.send(Reply(250, "", self.cfg.hostname))

    def do_ehlo(self, text: str) -> None:
        if not text:
            raise Refuse(501, "5.5.4", "Syntax: EHLO hostname")
        self.reset()
        self.helo, self.esmtp, self.stage = text, True, Stage.READY
        self.send(Reply(250, "", "\n".join(self.extensions())))

    def extensions(self) -> List[str]:
        tls = ["STARTTLS"] if self.door.has_tls and not self.tls else []
        auth = ["AUTH " + " ".join(self.mechanisms())] if self.cfg.has_logins else []
        if self.is_odmr:
            return [self.cfg.hostname, *tls, *auth, "ATRN", "ENHANCEDSTATUSCODES"]
        return [self.cfg.hostname, *tls, *auth, "PIPELINING", "SIZE %d" % self.door.size_limit, "ETRN", "8BITMIME", "SMTPUTF8",
                "ENHANCEDSTATUSCODES", "DSN", "CHUNKING", "LIMITS RCPTMAX=%d" % self.cfg.max_recipients]

    def do_mail(self, text: str) -> None:
        if text[:5].upper() != "FROM:":
            raise Refuse(501, "5.5.4", "Syntax: MAIL FROM:<address>")
        path, rest = parse_path(text[5:].lstrip(" "), "5.1.7")
        if not path.domain and path.local:
            raise Refuse(501, "5.1.7", "Sender address needs a domain")
        given = parse_parameters(rest)
        size = parse_size(given.pop("SIZE")) if "SIZE" in given else 0
        body = (given.pop("BODY") or "?").upper() if "BODY" in given else ""
        smtputf8 = "SMTPUTF8" in given
        if self.cfg.has_logins:
            given.pop("AUTH", None)     # RFC 4954 5: who offers AUTH must take it; nothing here depends on it
        ret = (given.pop("RET") or "?").upper() if "RET" in given else ""
        envid = parse_xtext(given.pop("ENVID"), ENVID_MAX) if "ENVID" in given else ""
        if given.pop("SMTPUTF8", None) or body not in ("", "7BIT", "8BITMIME") or ret not in ("", "FULL", "HDRS"):
            raise Refuse(501, "5.5.4", "Syntax error in parameters")
        if given:
            raise Refuse(555, "5.5.4", "Unsupported parameter: %s" % next(iter(given)))
        transaction = Transaction(str(path), size, body, smtputf8, ret, envid)
        if not smtputf8 and not text.isascii():
            return self._mail_answer(transaction, Reply(553, "5.6.7", "Address needs SMTPUTF8"))
        if self.door.size_limit and size > self.door.size_limit:
            return self._mail_answer(transaction, too_big(self.door.size_limit))
        self.ask("mail", transaction, lambda refused: self._mail_answer(transaction, refused))

    def _mail_answer(self, transaction: Transaction, refused: Optional[Reply]) -> None:
        if refused is not None:
            self.note_reject("MAIL", refused, " from=<%s>" % printable(transaction.sender))
            return self.send(refused, close=refused.code == 421)
        self.transaction, self.stage = transaction, Stage.MAIL
        self.send(Reply(250, "2.1.0", "Ok"))

    def do_rcpt(self, text: str) -> None:
        transaction = self.transaction
        assert transaction is not None
        if text[:3].upper() != "TO:":
            raise Refuse(501, "5.5.4", "Syntax: RCPT TO:<address>")
        path, rest = parse_path(text[3:].lstrip(" "), "5.1.3")
        given = parse_parameters(rest)
        notify = parse_notify(given.pop("NOTIFY")) if "NOTIFY" in given else ""
        orcpt = parse_orcpt(given.pop("ORCPT")) if "ORCPT" in given else ""
        if given:
            raise Refuse(555, "5.5.4", "Unsupported parameter: %s" % next(iter(given)))
        if not transaction.smtputf8 and not text.isascii():
            return self._rcpt_answer(Recipient(path, notify, orcpt), Reply(553, "5.6.7", "Address needs SMTPUTF8"))
        if not path.domain and not path.is_rerouting:
            if path.local.lower() != "postmaster" or not self.cfg.first_domain:
                raise Refuse(501, "5.1.3", "Recipient address needs a domain")
            path = Path(path.local, self.cfg.first_domain)          # RFC 5321 4.1.1.3
        recipient = Recipient(path, notify, orcpt)
        if path.is_rerouting or self.cfg.domain(path.domain) is None:
            return self._rcpt_answer(recipient, Reply(554, "5.7.1", "<%s>: Relay access denied" % str(path)))
        if len(transaction.recipients) >= self.cfg.max_recipients:
            return self._rcpt_answer(recipient, Reply(452, "4.5.3", "Too many recipients"))
        self.ask("rcpt", recipient, lambda refused: self._rcpt_answer(recipient, refused))

    def _rcpt_answer(self, recipient: Recipient, refused: Optional[Reply]) -> None:
        transaction = self.transaction
        assert transaction is not None
        if refused is not None:
            transaction.rcpt_refused = True
            self.note_reject("RCPT", refused, " from=<%s> to=<%s>" % (printable(transaction.sender),
                                                                      printable(recipient.address)))
            return self.send(refused)
        transaction.recipients.append(recipient)
        self.stage = Stage.RCPT
        self.send(Reply(250, "2.1.5", "Ok"))

    def do_data(self, text: str) -> None:
        if text:
            raise Refuse(501, "5.5.4", "Syntax: DATA")
        if self.stage is not Stage.RCPT:
            return self._no_recipients()
        self.reader, self.newlines, self.mode = DataReader(), Newlines(), Mode.DATA
        self.send(Reply(354, "", "End data with <CR><LF>.<CR><LF>"))

    def _no_recipients(self) -> None:
        """A client that pipelines DATA behind refused recipients makes no error, RFC 2920 3.1."""
        reply = self._out_of_order().reply
        if self.transaction is not None and self.transaction.rcpt_refused:
            return self.send(Reply(reply.code, reply.status, "No valid recipients"))
        self.fail(reply)

    def do_bdat(self, text: str) -> None:
        """RFC 3030 2.  Whatever is wrong, the octets announced are read and
        never taken for commands."""
        words = text.upper().split()
        if not words or not re.fullmatch(r"[0-9]{1,20}", words[0]) or words[1:] not in ([], ["LAST"]):
            raise Refuse(501, "5.5.4", "Syntax: BDAT octets [LAST]")
        self.chunk_left, self.chunk_last = int(words[0]), bool(words[1:])
        self.chunk_refused = None
        limit = self.door.size_limit
        if limit and self.chunk_left > limit * OVERSIZE_FACTOR:
            return self.send(too_big(limit), close=True)
        if self.stage not in (Stage.RCPT, Stage.CHUNKS):
            self.chunk_refused = self._out_of_order().reply
        elif self.stage is Stage.RCPT:
            self.newlines, self.stage = Newlines(), Stage.CHUNKS
        self.mode = Mode.CHUNK
        if not self.chunk_left:
            self._end_of_chunk()

    def _end_of_chunk(self) -> None:
        self.mode = Mode.COMMAND if self.mode is Mode.CHUNK else self.mode
        if self.mode is Mode.CLOSED:
            return
        if self.chunk_refused is not None:
            return self._no_recipients()
        if self.chunk_last:
            self._keep(self.newlines.feed(b"", last=True), 0)
            self._end_of_data()
        elif self.transaction is not None and self.transaction.refused is not None:
            self.send(self.transaction.refused)
        else:
            self.send(Reply(250, "2.0.0", "Chunk received"))

    def _end_of_data(self) -> None:
        transaction = self.transaction
        assert transaction is not None
        if self.mode is Mode.CLOSED:
            return
        if transaction.hops is not None:
            self._count_hops(transaction, transaction.hops)
        if self.newlines.found and self.cfg.bare_newline == "reject":
            self._refuse(transaction, Reply(550, "5.6.0", "Bare CR, bare LF or NUL in the message"))
        if transaction.refused is not None:
            return self._commit_answer(transaction.refused)
        self.ask("commit", transaction, self._commit_answer)

    def _commit_answer(self, reply: Reply) -> None:
        transaction = self.transaction
        assert transaction is not None
        if reply.code >= 400:
            self.note_reject("END-OF-MESSAGE", reply, " from=<%s> to=<%s>" % (
                printable(transaction.sender), printable(transaction.recipients[0].address)))
        self.transaction, self.stage = None, Stage.READY
        self.send(reply)

    def do_rset(self, text: str) -> None:
        self.reset()
        self.send(Reply(250, "2.0.0", "Ok"))

    def do_noop(self, text: str) -> None:
        self.send(Reply(250, "2.0.0", "Ok"))

    def do_vrfy(self, text: str) -> None:
        """RFC 5321 3.5.3: an address or a user's name, and nothing is told of either."""
        if not text:
            raise Refuse(501, "5.5.4", "Syntax: VRFY address")
        if "@" in text:
            parse_path(text if text[0] == "<" else "<%s>" % text, "5.1.3")
        self.send(Reply(252, "2.0.0", "Send some mail, it will be tried"))

    def do_expn(self, text: str) -> None:
        raise Refuse(502, "5.5.1", "EXPN not implemented")

    def do_help(self, text: str) -> None:
        self.send(Reply(214, "2.0.0", "EHLO HELO RSET NOOP HELP QUIT STARTTLS AUTH " + (
            "ATRN" if self.is_odmr else "MAIL RCPT DATA BDAT VRFY ETRN")))

    def do_quit(self, text: str) -> None:
        self.send(Reply(221, "2.0.0", "Bye"), close=True, at_once=True)

    def do_starttls(self, text: str) -> None:
        """RFC 3207 4.  What came behind the command in the clear would seem to
        come from within TLS later: such a client is turned away."""
        if not self.door.has_tls:
            raise Refuse(502, "5.5.1", "STARTTLS not offered")
        if text:
            raise Refuse(501, "5.5.4", "Syntax: STARTTLS")
        if self.tls:
            raise Refuse(503, "5.5.1", "TLS is active already")
        self.mode = Mode.TLS

    def _begin_tls(self) -> None:
        """The command was the last of what was read, or was not."""
        if self.buffer:
            self.out.append(Note("NOQUEUE: reject: STARTTLS from %s: 501 5.5.1 data behind STARTTLS in the clear"
                                 % format_peer(self.address, self.name)))
            return self.send(Reply(501, "5.5.1", "Data behind STARTTLS"), close=True)
        self.reset()
        self.send(Reply(220, "2.0.0", "Ready to start TLS"))
        self.ask("starttls", None, self._on_tls)

    def _on_tls(self, agreed: Tuple[str, str]) -> None:
        """All that was said before is forgotten, but the errors: RFC 3207 4.2."""
        self.tls, self.cipher = agreed
        self.helo, self.esmtp, self.stage, self.username = "", False, Stage.START, ""
        self.buffer.clear()
        self.mode = Mode.COMMAND

    # -- AUTH, RFC 4954: says for whom ETRN and ATRN are asked, and gives no other right

    def mechanisms(self) -> List[str]:
        return ["CRAM-MD5", "PLAIN"] if self.tls else ["CRAM-MD5"]

    def do_auth(self, text: str) -> None:
        if not self.cfg.has_logins:
            raise Refuse(502, "5.5.1", "AUTH not offered")
        if self.username:
            raise Refuse(503, "5.5.1", "Authenticated already")
        mechanism, _, initial = text.partition(" ")
        mechanism = mechanism.upper()
        if not mechanism:
            raise Refuse(501, "5.5.4", "Syntax: AUTH mechanism")
        if mechanism == "PLAIN" and not self.tls:
            raise Refuse(538, "5.7.11", "Encryption required for this mechanism: STARTTLS first")
        if mechanism not in self.mechanisms():
            raise Refuse(504, "5.5.4", "Unknown mechanism")
        if mechanism == "CRAM-MD5":
            if initial:
                raise Refuse(501, "5.7.0", "This mechanism has no initial response")
            self.ask("challenge", None, self._challenge)
        elif initial:
            self._on_response("PLAIN", parse_plain(decode_base64(b"" if initial == "=" else initial.encode("utf-8"))))
        else:
            self.exchange = lambda response: self._on_response("PLAIN", parse_plain(response))
            self.send(Reply(334, "", ""))

    def _challenge(self, challenge: bytes) -> None:
        """It is the server's: chance and time are none of ours."""
        self.exchange = lambda response: self._on_response("CRAM-MD5", parse_cram(response, challenge))
        self.send(Reply(334, "", base64.b64encode(challenge).decode("ascii")))

    def _continue_auth(self, line: bytes) -> None:
        """The client's answer to a 334."""
        exchange, self.exchange = self.exchange, None
        assert exchange is not None
        try:
            if line.strip() == b"*":
                raise Refuse(501, "5.7.0", "Authentication cancelled")
            exchange(decode_base64(line))
        except Refuse as refusal:
            self.fail(refusal.reply)

    def _on_response(self, mechanism: str, login: Optional[Login]) -> None:
        """A response that is not in form is as wrong as a wrong password; which of them it is is not told."""
        self.ask("login", login or Login(mechanism, "", b"", b""),
                 lambda refused: self._login_answer(mechanism, login.username if login else "", refused))

    def _login_answer(self, mechanism: str, username: str, refused: Optional[Reply]) -> None:
        peer = format_peer(self.address, self.name)
        if refused is None:
            self.username = username
            self.out.append(Note("%s: sasl_method=%s, sasl_username=%s" % (peer, mechanism, printable(username, 100))))
            return self.send(Reply(235, "2.7.0", "Authentication successful"))
        if refused.code != 535:         # it could not be judged
            return self.send(refused)
        self.out.append(Note("warning: %s: SASL %s authentication failed: %s, sasl_username=%s" % (
            peer, mechanism, refused.text, printable(username, 100))))
        self.failed_logins += 1
        if self.failed_logins >= LOGINS_FAILED_MAX:
            return self.send(Reply(421, "4.7.0", "%s Error: too many failed authentications" % self.cfg.hostname), close=True)
        self.send(refused)

    def do_etrn(self, text: str) -> None:
        """RFC 1985 5.2; always one line, fetchmail reads no more."""
        if not text:
            raise Refuse(500, "5.5.4", "Syntax: ETRN domain")
        name = text[1:] if text[0] == "@" else text
        try:
            name = parse_domain(name)
        except ValueError:
            raise Refuse(501, "5.5.4", "Not a domain") from None
        self.ask("etrn", ("@" if text[0] == "@" else "") + name, self.send)

    def do_atrn(self, text: str) -> None:
        """RFC 2645 5.2.1.  Without domains all of the customer's are meant."""
        if not self.is_odmr:
            raise Refuse(502, "5.5.1", "ATRN is for the ports of on-demand mail relay")
        if not self.username:
            raise Refuse(530, "5.7.0", "Authentication required")
        try:
            domains = tuple(parse_domain(word.strip(" ")) for word in text.split(",")) if text else ()
        except ValueError:
            raise Refuse(501, "5.5.4", "Syntax: ATRN [domain[,domain]...]") from None
        self.ask("atrn", domains, self._atrn_answer)

    def _atrn_answer(self, reply: Reply) -> None:
        self.send(reply)
        if reply.code == 250:
            self.out.append(Reverse(bytes(self.buffer)))
            self.mode = Mode.CLOSED


ANY = frozenset(Stage)
COMMANDS: Dict[bytes, Tuple[Callable[[Session, str], None], FrozenSet[Stage]]] = {     # verb: (handler, legal in)
    b"HELO": (Session.do_helo, ANY),
    b"EHLO": (Session.do_ehlo, ANY),
    b"MAIL": (Session.do_mail, frozenset({Stage.READY})),
    b"RCPT": (Session.do_rcpt, frozenset({Stage.MAIL, Stage.RCPT})),
    b"DATA": (Session.do_data, frozenset({Stage.MAIL, Stage.RCPT})),
    b"BDAT": (Session.do_bdat, ANY),                        # it judges for itself, after the octets
    b"RSET": (Session.do_rset, ANY),
    b"NOOP": (Session.do_noop, ANY),
    b"VRFY": (Session.do_vrfy, ANY),
    b"EXPN": (Session.do_expn, ANY),
    b"HELP": (Session.do_help, ANY),
    b"QUIT": (Session.do_quit, ANY),
    b"STARTTLS": (Session.do_starttls, ANY),                # a transaction is forgotten, RFC 3207 4.2
    b"AUTH": (Session.do_auth, frozenset({Stage.READY})),   # not within a transaction, RFC 4954 4
    b"ETRN": (Session.do_etrn, frozenset({Stage.READY})),   # not within a transaction, RFC 1985 5
    b"ATRN": (Session.do_atrn, ANY),                        # 530 comes first, RFC 2645 5.2.1
}
ODMR_COMMANDS = frozenset(b"EHLO HELO STARTTLS AUTH ATRN NOOP RSET HELP QUIT".split())


_BASE64 = re.compile(rb"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")


def decode_base64(text: bytes) -> bytes:
    """As RFC 4648 4 has it; what Python's decoder lets pass differs between its versions.  Raises Refuse: RFC 4954 4."""
    if not _BASE64.fullmatch(text):
        raise Refuse(501, "5.5.2", "Not base64")
    return base64.b64decode(text)


def format_received(session: Session, transaction: Transaction, id: str, now: Time) -> bytes:
    """Our trace field, RFC 5321 4.4, in the shape spam filters take the
    original client's address from.  `with` as in RFC 3848 and RFC 6531 4.3."""
    helo = re.sub(r"[^A-Za-z0-9.:_\[\]-]", "?", session.helo[:255])
    address = "IPv6:" + session.address if ":" in session.address else session.address
    protocol = "SMTP"
    if session.esmtp:
        protocol = ("UTF8SMTP" if transaction.smtputf8 else "ESMTP") + ("S" if session.tls else "")
    lines = ["Received: from %s (%s [%s])" % (helo, session.name, address)]
    if session.tls:
        lines.append("\t(using %s with cipher %s)" % (session.tls, session.cipher))
    lines.append("\tby %s (etrn_relay) with %s id %s" % (session.cfg.hostname, protocol, id))
    if len(transaction.recipients) == 1 and transaction.recipients[0].address.isascii():
        lines.append("\tfor <%s>" % transaction.recipients[0].address)
    lines[-1] += ";"
    lines.append("\t" + format_date(int(now)))
    return ("\r\n".join(lines) + "\r\n").encode("ascii", "replace")


# == 8. SCHEDULE ===============================================================
# When is a message due, how many connections may a primary have, what is its
# state.  Pure: time is an argument, nothing is sent or read here.

NOTICES, ALERTS = "notice:", "alert:"   # begin the names of sites that are not domains of ours
WAITS = {"atrn": "waits to be collected by the domain's own mail server (ATRN)",
         "etrn": "waits for the domain's own mail server to say where it is (authenticated ETRN)"}
UNCOLLECTED = "the domain's own mail server did not come for it in time"


class Now(NamedTuple):
    """Both clocks, read once a turn of the loop: monotonic for pauses, wall for what people and other hosts see."""
    mono: float
    wall: Time


class Hop(NamedTuple):
    """Where a connection may lead: one address of a host."""
    host: str
    address: str
    port: int

    def __str__(self) -> str:
        return "%s[%s]:%d" % (self.host, self.address, self.port)

    @property
    def where(self) -> str:
        """For people: an address is not said twice."""
        return str(self if self.host != self.address else Endpoint(self.address, self.port))


class Primary(enum.Enum):
    UNKNOWN = "unknown"
    UP = "up"
    DOWN = "down"
    REJECTING = "rejecting"


class State(enum.Enum):
    """Of an entry.  Postfix's names: active, deferred, hold, and what is being sent."""
    ACTIVE = 1
    DEFERRED = 2
    DELIVERING = 3
    HOLD = 4


class Entry:
    """One message as far as one site is concerned; a message to two served
    domains has two.  Small, because a hundred thousand may wait."""
    __slots__ = ("id", "size", "received", "expires", "due", "attempts", "tries", "base", "deferrals", "state", "round",
                 "again", "hold")

    def __init__(self, id: str, size: int, received: Time, expires: Time, attempts: int = 0) -> None:
        self.id = id
        self.size = size
        self.received = received
        self.expires = expires
        self.due = 0.0                  # monotonic, when deferred
        self.attempts = attempts        # as the sidecar has them
        self.tries = 0                  # failed ones since the start or the last jump of the clock
        self.base = 0                   # the site's failures that attempts and tries include
        self.deferrals = 0              # answers to this very message; they set its pause
        self.state = State.ACTIVE
        self.round = 0                  # the flush it still belongs to
        self.again = False              # a flush came while it was being sent
        self.hold = False               # held by itself, as its sidecar says; the whole site may be, too


class Site:
    """One domain: what waits for its primary, and what is known of that.

    An outage ends when the primary greets.  Then one message goes alone (the
    canary); taken, it proves the primary, and each further message taken
    allows one connection more, up to `connections`."""

    def __init__(self, name: str, cfg: DomainConfig, now: Now) -> None:
        self.name = name
        self.cfg = cfg
        self.state = Primary.UNKNOWN
        self.since = now.wall
        self.last_error = ""
        self.entries: Dict[str, Entry] = {}
        self.active: List[Tuple[Time, str]] = []            # heaps; what they name may have moved on since
        self.deferred: List[Tuple[float, str]] = []
        self.aging: List[Tuple[Time, str]] = []
        self.overdue: List[str] = []
        self.count = dict.fromkeys(State, 0)
        self.last_flush = -INF          # monotonic
        self.is_odd = False             # it answers CHUNKING out of step
        self.is_wary = False            # its last connection broke with several messages in flight
        self.handed: Set[str] = set()           # queue IDs that connections have; others DELIVERING are being written
        self.octets = 0
        self.is_held = False            # --hold DOMAIN: later mail too
        self.opening = 0                # connections not yet greeted
        self.open = 0
        self.limit = 1                  # connections allowed now
        self.pace_s = 0.0               # between two answers on one connection; a moving average
        self.is_proven = False          # has taken a message since it was last down
        self.failures = 0               # attempts to reach it that failed, all told
        self.quick = 0                  # failures since this outage began; the first pauses are short
        self.next_probe = now.mono
        self.last_start = now.mono - TRIGGER_S
        self.last_asked = now.mono - TRIGGER_S      # monotonic, of the last start that somebody asked for
        self.is_asked = False           # the next start was asked for
        self.verdicts: Deque[bool] = collections.deque(maxlen=VERDICTS)     # True for a 4xx
        self.round = 0                  # number of the present flush
        self.round_left = 0             # its messages not yet tried
        self.again = False              # a flush came while a connection was opening
        self.counters = dict.fromkeys(COUNTERS.values(), 0)
        self.size_limit = 0             # the primary's SIZE, 0 when not known
        self.recovered = 0.0            # wall, end of the last outage that we saw
        self.rejected_since = 0.0       # wall, when it last began to reject
        self.pardoned = 0.0             # wall: no 5xx before that counts as a message's first
        self.refused: Set[str] = set()          # messages refused in a row
        self.refused_good: Set[str] = set()     # recipients known to be good refused in a row
        self.tried: Set[str] = set()    # messages that went alone since the primary last took one
        self.is_returning = False       # an outage has ended, or it rejects: nothing taken yet
        self.was_away = False           # could not be reached since it was last heard
        self.is_release_due = False     # what it put off meanwhile is due when it takes a message
        self.jumped = -INF              # monotonic, when the wall clock last jumped
        self.canaries = 0               # canaries in a row that were answered 4xx
        self.delays: List[Tuple[Time, str]] = []            # heap: when a sender is told of the delay
        self.last_heard = -INF          # monotonic, when it last answered anything well
        self.route: List[Hop] = []      # where the last connections led, best first
        self.route_seen = 0.0           # wall
        self.home = ""                  # primary = etrn: the address the last authenticated ETRN came from
        self.is_collecting = False      # its primary is here, by ATRN
        self.watched_since = now.mono   # from when on the passing of time is known to be real

    @property
    def waits_for(self) -> str:
        """What must happen before we can connect to the primary; empty when we
        can try at any time.  Where it is not empty there are no probes, no questions, no
        cut-through and no failed attempts: mail waits until somebody comes for it."""
        return "" if self.home or isinstance(self.cfg.primary, tuple) else WAITS.get(self.cfg.primary, "")

    @property
    def trouble(self) -> str:
        """Why mail is still here, in words: what went wrong last, or what it waits for."""
        return self.last_error or self.waits_for

    # -- entries

    @property
    def label(self) -> str:
        """For the log and for people."""
        if not self.cfg.is_notices:
            return self.name
        kind, _, domain = self.name.partition(":")
        return "%ss to %s" % (kind, domain or str(self.cfg.primary[0]))

    def _set(self, entry: Entry, state: State) -> None:
        self.count[entry.state] -= 1
        self.count[state] += 1
        entry.state = state
        if state is not State.DELIVERING:
            self.handed.discard(entry.id)
        if state is State.ACTIVE:
            heapq.heappush(self.active, (entry.received, entry.id))
            self._tidy(self.active, state)
        elif state is State.DEFERRED:
            heapq.heappush(self.deferred, (entry.due, entry.id))
            self._tidy(self.deferred, state)

    def _tidy(self, heap: List[Tuple[float, str]], state: State) -> None:
        """Mail that is held and released again and again leaves its old places behind."""
        if len(heap) > 2 * len(self.entries) + 1000:
            heap[:] = {one for one in heap if one[1] in self.entries and self.entries[one[1]].state is state
                       and (state is State.ACTIVE or self.entries[one[1]].due == one[0])}
            heapq.heapify(heap)

    def add(self, entry: Entry, now: Now, next_attempt: Time = 0.0, held: bool = False) -> None:
        """A new message, or one found in the spool with a pause still to run."""
        self.entries[entry.id] = entry
        self.octets += entry.size
        entry.base = self.failures
        self.count[State.ACTIVE] += 1
        pause = min(next_attempt - now.wall, self.cfg.max_retry_interval)
        entry.hold = held
        if held or self.is_held:
            self._set(entry, State.HOLD)
        elif pause > 0:
            entry.due = now.mono + pause
            self._set(entry, State.DEFERRED)
        else:
            heapq.heappush(self.active, (entry.received, entry.id))
        heapq.heappush(self.aging, (entry.expires, entry.id))
        if self.cfg.delay_notice and not self.cfg.is_notices:
            heapq.heappush(self.delays, (entry.received + self.cfg.delay_notice, entry.id))
        if len(self.aging) > 2 * len(self.entries) + 1000:      # most of what it names has left long ago
            self.aging = [(other.expires, other.id) for other in self.entries.values()]
            heapq.heapify(self.aging)
            self.delays = [one for one in self.delays if one[1] in self.entries]
            heapq.heapify(self.delays)

    def drop(self, id: str) -> None:
        entry = self.entries.pop(id)
        self.handed.discard(id)
        self.count[entry.state] -= 1
        self.octets -= entry.size
        self._leave_round(entry)

    def attempts(self, entry: Entry) -> int:
        """All attempts: those its sidecar knows, and the failed connections since."""
        return entry.attempts + self.failures - entry.base

    def tries(self, entry: Entry) -> int:
        return entry.tries + self.failures - entry.base

    def count_attempt(self, entry: Entry) -> int:
        """It was tried.  Returns the number of attempts its sidecar does not know of yet."""
        new = 1 + self.failures - entry.base
        entry.attempts += new
        entry.tries += new
        entry.base = self.failures
        entry.deferrals += 1
        return new

    def oldest(self) -> Optional[Time]:
        """When the oldest message came.  Age and expiry go in the same order: no message is looked at twice."""
        first = next((id for id in self.overdue if id in self.entries), None)
        if first is None and self.next_expiry() is not None:
            first = self.aging[0][1]
        return self.entries[first].received if first is not None else None

    def take(self, most: int, now: Now) -> List[Entry]:
        """Up to `most` messages for one connection, oldest first; they are DELIVERING from now on."""
        self._wake(now)
        if not self.is_proven:
            return self._take_canary(now)
        out: List[Entry] = []
        while self.active and len(out) < most:
            entry = self.entries.get(heapq.heappop(self.active)[1])
            if entry is not None and entry.state is State.ACTIVE:
                entry.again = False
                self._set(entry, State.DELIVERING)
                self.handed.add(entry.id)
                out.append(entry)
        return out

    def _take_canary(self, now: Now) -> List[Entry]:
        """One message: the oldest that has not gone alone since the primary
        last took one.  A message that it will never take keeps no other waiting."""
        if now.mono < self.next_probe or self.handed:
            return []
        if self.state is Primary.REJECTING and not self.count[State.ACTIVE]:
            self._wake_one()            # one is tried every probe_interval, whichever is due first
        found, seen = None, []
        for tried in (self.tried, set()):       # all of them were: another round
            while self.active and found is None:
                item = heapq.heappop(self.active)
                entry = self.entries.get(item[1])
                if entry is not None and entry.state is State.ACTIVE:
                    if item[1] in tried:
                        seen.append(item)
                    else:
                        found = entry
            for item in seen:
                heapq.heappush(self.active, item)
            if found is None:
                self.tried.clear()
            seen = []
        if found is None:
            return []
        self.tried.add(found.id)
        self.last_start = self.last_asked = now.mono        # a flood of ETRNs costs one try a second
        self.is_asked = False
        found.again = False
        self._set(found, State.DELIVERING)
        self.handed.add(found.id)
        return [found]

    def is_due(self, now: Now) -> bool:
        """Whether there is mail to be given out."""
        self._wake(now)
        return self.count[State.ACTIVE] > 0

    def _wake(self, now: Now) -> None:
        """Deferred messages whose pause is over."""
        while self.deferred and self.deferred[0][0] <= now.mono:
            due, id = heapq.heappop(self.deferred)
            entry = self.entries.get(id)
            if entry is not None and entry.state is State.DEFERRED and entry.due == due:
                self._set(entry, State.ACTIVE)

    def start(self, entry: Entry) -> int:
        """Taken out of turn, to be ended: nobody else gets it.  Returns the attempts its sidecar does not know of."""
        self._set(entry, State.DELIVERING)
        new, entry.base = self.failures - entry.base, self.failures
        return new

    def _wake_one(self) -> None:
        while self.deferred and not self.count[State.ACTIVE]:
            due, id = heapq.heappop(self.deferred)
            entry = self.entries.get(id)
            if entry is not None and entry.state is State.DEFERRED and entry.due == due:
                self._set(entry, State.ACTIVE)

    def give_back(self, entry: Entry) -> None:
        """Taken but not tried."""
        self._set(entry, State.HOLD if entry.hold or self.is_held else State.ACTIVE)

    def defer(self, entry: Entry, now: Now, pause: float) -> None:
        """Tried, and to be tried again after `pause` seconds; at once when a flush came meanwhile."""
        self._leave_round(entry)
        entry.due = now.mono + pause
        if entry.hold or self.is_held:
            self._set(entry, State.HOLD)
        else:
            self._set(entry, State.ACTIVE if entry.again else State.DEFERRED)
        entry.again = False

    def hold(self, entry: Entry, on: bool) -> None:
        """One message.  What is being sent is held, if it comes back."""
        entry.hold = on
        self._settle(entry)

    def hold_all(self, on: bool) -> List[Entry]:
        """All of it and all that comes later, or none.  Returns the messages
        that were held by themselves and are no more."""
        self.is_held = on
        alone = [entry for entry in self.entries.values() if entry.hold and not on]
        for entry in alone:
            entry.hold = False
        for entry in self.entries.values():
            self._settle(entry)
        return alone

    def _settle(self, entry: Entry) -> None:
        held = entry.hold or self.is_held
        if entry.state is not State.DELIVERING and held != (entry.state is State.HOLD):
            self._forget_tries(entry)   # from before the hold: released mail has its chance, however old it became
            self._leave_round(entry)
            self._set(entry, State.HOLD if held else State.ACTIVE)

    def pause(self, attempts: int, now: Now) -> float:
        """Seconds after the nth 4xx for one message, n from 1; RFC 5321 4.5.4.1.
        Sooner after an outage: greylisting passes within minutes."""
        usual = min(self.cfg.retry_interval * 2.0 ** min(attempts - 1, 30), self.cfg.max_retry_interval)
        if self.is_recovering(now) and attempts <= len(EARLY_PAUSES_S):
            return min(usual, EARLY_PAUSES_S[attempts - 1])
        return usual

    # -- flush

    def release_all(self) -> None:
        """Everything but held mail is due now."""
        for entry in self.entries.values():
            if entry.state is State.DEFERRED:
                self._set(entry, State.ACTIVE)
        self.deferred.clear()

    def flush(self, now: Now) -> bool:
        """ETRN, --flush, SIGUSR1.  False when one was under way already; even
        then there will be another look.  Probes once a second at most."""
        fresh = self.round_left == 0
        if self.count[State.DEFERRED]:
            self.release_all()
        elif now.mono - self.last_flush < TRIGGER_S:
            for id in self.handed:
                self.entries[id].again = True
            self.trigger(now)           # all else is due since a moment ago: a flood costs no walk through the queue each
            return fresh or bool(self.waits_for)
        self.last_flush = now.mono
        if self.waits_for:
            return True                 # due it is, for the next who comes
        self.round += 1
        self.round_left = 0
        for entry in self.entries.values():
            if entry.state is State.ACTIVE:
                entry.round = self.round
                self.round_left += 1
            elif entry.state is State.DELIVERING:
                entry.again = True
        self.trigger(now)
        return fresh

    def trigger(self, now: Now) -> None:
        """Something says that the primary may be back."""
        self.again = self.opening > 0
        self.is_asked = True            # a flood costs one a second; the first has its answer at once
        self.next_probe = min(self.next_probe, max(now.mono, self.last_asked + TRIGGER_S))

    def _leave_round(self, entry: Entry) -> None:
        if entry.round == self.round and self.round_left:
            self.round_left -= 1
        entry.round = 0

    # -- connections

    def wanted(self, now: Now) -> bool:
        """Whether to open a connection now; they open one after the other."""
        if self.waits_for or self.is_collecting:
            return False
        self._wake(now)
        waiting = self.count[State.ACTIVE]
        if not waiting and not (self.state is Primary.REJECTING and self.count[State.DEFERRED]):
            return False
        if self.state is Primary.UP and self.is_proven:
            if self.pace_s < QUICK_PACE_S:
                target = min(self.limit, QUICK_CONNECTIONS, 1 + waiting // MESSAGES_PER_CONNECTION)
            else:
                target = min(self.limit, self.open + 1)
            return not self.opening and self.open < target and now.mono >= self.next_probe
        # One probe may hang in the dark while the next, later, finds the primary back.
        return not self.open and now.mono >= self.next_probe and self.opening * self.cfg.probe_interval < CONNECT_S

    def share(self) -> int:
        """Of what waits and is with connections, the part of one: the oldest go by
        all of them, and do not queue up behind one that is slow."""
        most = min(self.cfg.connections, QUICK_CONNECTIONS) if self.pace_s < QUICK_PACE_S else self.cfg.connections
        return max(2, -(-(self.count[State.ACTIVE] + len(self.handed)) // most))

    def wake(self, now: Now) -> Optional[float]:
        """The monotonic time at which wanted() or take() may change by itself."""
        if self.waits_for or self.is_collecting:
            return None
        times = [self.deferred[0][0]] if self.deferred else []
        tried = self.count[State.ACTIVE] or (self.state is Primary.REJECTING and self.deferred)
        if tried and self.next_probe > now.mono:
            times.append(self.next_probe)
        return min(times, default=None)

    def on_started(self, now: Now) -> None:
        self.opening += 1
        self.last_start = now.mono
        if self.is_asked:
            self.last_asked, self.is_asked = now.mono, False
        if not (self.state is Primary.UP and self.is_proven):
            self.next_probe = now.mono + self._probe_pause()

    def _probe_pause(self) -> float:
        """It doubles; slowly, because most outages are over within minutes.  A stranger's host is not pressed so."""
        steps = self.quick // (2 if self.cfg.is_notices else QUICK_PROBES)
        return min(self.cfg.probe_interval, PROBE_FIRST_S * 2.0 ** min(steps, 20))

    def on_moved(self, now: Now) -> None:
        """Another primary than before: the way there, and how it takes mail, are to be found out anew."""
        self.route = []                 # mail never goes to a primary that was configured once
        self.is_odd = self.is_wary = self.is_proven = False
        self.limit, self.pace_s = 1, 0.0
        self.trigger(now)

    def on_replaced(self, now: Now) -> None:
        """... and another server, too, of which nothing is known."""
        self.on_moved(now)
        self.last_heard, self.size_limit = -INF, 0
        self._forget_row()
        if self.state is Primary.UP:
            self.state, self.since = Primary.UNKNOWN, now.wall

    def on_parted(self, was_greeted: bool) -> None:
        """A connection to the former primary no longer counts as one to this."""
        if was_greeted:
            self.open -= 1
        else:
            self.opening -= 1
            self.again = self.again and self.opening > 0

    def on_connected(self, now: Now) -> Optional[float]:
        """It greeted.  Returns the length of the outage that ended, if one did."""
        self.opening -= 1
        self.open += 1
        self.again = False
        if not self.is_proven:
            self.next_probe = now.mono          # for the canary
        return self.on_heard(now)

    def on_came(self, now: Now) -> Optional[float]:
        """The primary came for its mail (ATRN) and greeted: that proves it, and
        no canary is needed.  Returns the length of the outage that ended, if one did."""
        lasted = self.on_heard(now)
        self.open += 1
        self.is_proven = self.state is not Primary.REJECTING
        self.next_probe = now.mono
        return lasted

    def on_left(self, now: Now, error: str, came: bool) -> None:
        """And has gone again: nothing is known of it until it is heard of anew."""
        self.is_collecting = False
        self.open -= came
        self.is_proven = self.is_proven and self.open > 0
        self.limit = 1
        self.last_error = error or self.last_error
        if self.waits_for and self.state is Primary.UP:
            self.state, self.since = Primary.UNKNOWN, now.wall

    def on_refused(self, now: Now, id: str, good: Iterable[str]) -> bool:
        """A message was answered 5xx, all of its recipients.  `good`: those of
        them known to be good, when not the message was refused.  One message or
        recipient counts once, however often it is tried: a user who has left
        is no sign of trouble.  True when this makes the primary `rejecting`:
        it is there, but not itself."""
        if not self.is_recovering(now):
            self.refused.clear()
        elif len(self.refused) < REFUSED_ROW:
            self.refused.add(id)
        if len(self.refused_good) < REFUSED_ROW:
            self.refused_good.update(good)
        if self.state is Primary.REJECTING:
            self.next_probe = now.mono + self.cfg.probe_interval
            return False
        if max(len(self.refused), len(self.refused_good)) < REFUSED_ROW:
            return False
        self.state, self.since = Primary.REJECTING, now.wall
        self.is_proven, self.is_returning, self.is_release_due, self.limit = False, True, True, 1
        self.next_probe = now.mono + self.cfg.probe_interval
        self.round_left = 0             # a flush that finds it so is over
        self.round += 1
        return True

    def heal(self, now: Now) -> bool:
        """--flush: the operator says that a rejecting primary is itself again.
        Believed until it is seen to be otherwise, and the grace begins anew."""
        if self.state is not Primary.REJECTING:
            return False
        self._end_rejecting(now)
        self.pardoned = now.wall
        return True

    def _end_rejecting(self, now: Now) -> None:
        """What it said until now is pardoned, because its mailboxes may come back one by one;
        but once a day, or mail to three who have left would never be returned."""
        self.rejected_since = self.since
        self.state, self.since, self.recovered, self.last_error = Primary.UP, now.wall, now.wall, ""
        if now.wall - self.pardoned >= PARDON_S:
            self.pardoned = now.wall
        self._forget_row()

    def _forget_row(self) -> None:
        self.refused.clear()
        self.refused_good.clear()
        self.canaries = 0

    def on_heard(self, now: Now) -> Optional[float]:
        """It greeted, a courier or somebody with a question."""
        self.last_error = ""
        self.last_heard = now.mono
        if self.state in (Primary.UP, Primary.REJECTING):
            return None
        lasted = None
        if self.state is Primary.DOWN:
            lasted, self.recovered, self.is_returning = max(0.0, now.wall - self.since), now.wall, True
            self._forget_row()
        if self.was_away or self.state is Primary.UNKNOWN:
            self.is_release_due = True
            self.release_all()          # but not what makes it hang up, whenever it comes to that
        self.was_away = False
        self.state, self.since = Primary.UP, now.wall
        self.next_probe = now.mono
        return lasted

    def on_unheard(self, now: Now, error: str) -> bool:
        """Somebody with a question did not reach it.  True when this begins an outage."""
        self.was_away = self.was_away or not self.open
        return not self.open and self._down(now, error)

    def is_known_up(self, now: Now) -> bool:
        return not self.waits_for and self.state is Primary.UP and now.mono - self.last_heard <= KNOWN_UP_S

    def may_ask(self, now: Now) -> bool:
        """Whether a question to the primary is worth the waiting.  While mail
        waits for a primary that is down, it is being tried all the time."""
        if self.state is Primary.REJECTING or self.waits_for:
            return False                # what it says now says nothing; or there is nobody to ask
        return self.state is not Primary.DOWN or (not self.entries and now.mono - self.last_start >= self.cfg.probe_interval)

    def is_recovering(self, now: Now) -> bool:
        """Whether an outage ended less than `recovery_grace` ago."""
        return now.wall - self.recovered < self.cfg.recovery_grace

    def is_itself(self, now: Now) -> bool:
        """Whether what it says of a recipient is worth remembering.  Back from
        an outage it may not have its users yet: not before it took a message."""
        return self.state is not Primary.REJECTING and not (self.is_returning and self.is_recovering(now))

    def may_cut_through(self, now: Now) -> bool:
        """Whether the primary's verdict on a new message is worth the waiting, and may be believed."""
        return (self.cfg.cutthrough and not self.waits_for and not self.cfg.is_notices and not self.is_held
                and not self.is_recovering(now) and self.state in (Primary.UP, Primary.UNKNOWN))

    def urge(self, entry: Entry) -> None:
        """Somebody waits for this one: before all others."""
        if entry.state is State.ACTIVE:
            heapq.heappush(self.active, (-entry.received, entry.id))

    def on_failed(self, now: Now, error: str) -> bool:
        """A connection did not come about.  True when this begins an outage."""
        self.opening -= 1
        self.failures += 1
        if self.open:                   # it is there, but takes no more connections
            self.slow_down(now)
            return False
        self.was_away = True
        return self._down(now, error)

    def on_closed(self, now: Now, error: str) -> bool:
        """A connection ended, `error` empty when in good order.  True when this begins an outage."""
        self.open -= 1
        if not error:
            return False
        self.slow_down(now)
        if self.open or self.is_proven:
            self.is_proven = self.is_proven and self.open > 0       # the next one is a canary again
            return False
        self.failures += 1
        self.is_release_due = False     # what it hung up on waits out its own pause
        return self._down(now, error)

    def _down(self, now: Now, error: str) -> bool:
        begins = self.state is not Primary.DOWN
        if begins:
            self.since = now.wall
        self.state, self.last_error, self.is_proven, self.limit = Primary.DOWN, error, False, 1
        if self.again:
            self.again = False
            self.next_probe = max(now.mono, self.last_start + TRIGGER_S)
        else:
            self.next_probe = max(self.last_start + self._probe_pause(), now.mono)
            self.round_left = 0         # a flush that found the primary away is over
            self.round += 1
        self.quick += 1
        return begins

    def on_taken(self, now: Now, pace_s: float = 1.0) -> bool:
        """A message was taken, so long after the one before on its connection.
        True when that healed a `rejecting` primary."""
        self.last_heard = now.mono
        self.pace_s += (min(pace_s, SLOW_PACE_S) - self.pace_s) / 64        # no single hiccup counts for much
        self.verdicts.append(False)
        self.quick = 0
        self._forget_row()
        self.tried.clear()
        healed = self.state is Primary.REJECTING
        if healed:
            self._end_rejecting(now)
        if self.is_proven:
            self.limit = min(self.cfg.connections, self.limit + 1)
        elif self.is_release_due:
            self.release_all()          # what it put off before it was quite there
        self.is_proven, self.is_returning, self.is_release_due = True, False, False
        return healed

    def on_deferred(self, now: Now) -> None:
        """A message was answered 4xx, or a 5xx that is not believed yet."""
        self.verdicts.append(True)
        if self.state is Primary.REJECTING:
            self.next_probe = now.mono + self.cfg.probe_interval
        elif not self.is_proven:        # still starting: the next canary in a moment, not the whole queue now
            self.quick += 1
            self.canaries += 1
            self.next_probe = now.mono + self._probe_pause()
            if self.canaries >= CANARIES_DEFERRED:
                self.is_proven, self.limit = True, 1        # it greylists: all must be offered once
        elif len(self.verdicts) == VERDICTS and sum(self.verdicts) * 2 > VERDICTS:
            self.slow_down(now)

    def slow_down(self, now: Now) -> None:
        """421, a refused connection, or mostly 4xx: half the connections."""
        self.limit = max(1, self.limit // 2)
        self.verdicts.clear()
        self.next_probe = max(self.next_probe, now.mono + PROBE_FIRST_S)

    # -- time

    def is_final(self, now: Now, refused_since: Optional[Time], was_good: bool) -> bool:
        """Whether a 5xx is believed: only of a primary steadily up for
        `recovery_grace`, for a recipient not known to be good; or when the first one is that long ago."""
        grace = self.cfg.recovery_grace
        if self.state is Primary.REJECTING:
            return False
        if self.state is Primary.UP and now.wall - self.since >= grace and not was_good:
            return True
        if now.mono - self.jumped < grace:
            return False                # what the wall clock says of the time between is not true
        return refused_since is not None and now.wall - refused_since >= grace

    def expired(self, now: Now) -> List[Entry]:
        """Messages past their time that were tried often enough since the
        start or the last jump of the clock; held mail stays."""
        while self.aging and self.aging[0][0] <= now.wall:
            expires, id = heapq.heappop(self.aging)
            entry = self.entries.get(id)
            if entry is not None and entry.expires == expires:
                self.overdue.append(id)
        out, later = [], []
        for id in self.overdue:
            entry = self.entries.get(id)
            if entry is None:
                continue
            if entry.expires > now.wall:        # the clock went back
                heapq.heappush(self.aging, (entry.expires, id))
            elif entry.state in (State.ACTIVE, State.DEFERRED) and self._had_its_chance(entry, now):
                out.append(entry)
            else:
                later.append(id)
        self.overdue = later
        return out

    def _had_its_chance(self, entry: Entry, now: Now) -> bool:
        """What must be so besides the lifetime, which is told by a clock that may
        be wrong.  Where nothing can be tried, time that really passed stands for attempts."""
        if self.waits_for:
            return now.mono - self.watched_since >= min(UNCOLLECTED_S, self.cfg.lifetime)
        return self.tries(entry) >= ATTEMPTS_MIN

    def next_expiry(self) -> Optional[Time]:
        """When the next message will have waited for too long."""
        while self.aging:
            expires, id = self.aging[0]
            entry = self.entries.get(id)
            if entry is not None and entry.expires == expires:
                return expires
            heapq.heappop(self.aging)
        return None

    def delayed(self, now: Now) -> List[Entry]:
        """Messages that have become old enough for a notice of the delay."""
        out = []
        while self.delays and self.delays[0][0] <= now.wall:
            entry = self.entries.get(heapq.heappop(self.delays)[1])
            if entry is not None:
                out.append(entry)
        return out

    def on_clock_jump(self, now: Now, seconds: float) -> None:
        """The wall clock was set: what was measured by it is as old as before."""
        self.since, self.recovered, self.rejected_since, self.pardoned = (
            max(0.0, at + seconds) if at else at for at in (self.since, self.recovered, self.rejected_since, self.pardoned))
        self.jumped = now.mono
        for entry in self.entries.values():
            self._forget_tries(entry)

    def _forget_tries(self, entry: Entry) -> None:
        """It must be tried anew before it may expire; the attempts are told all the same."""
        entry.attempts, entry.tries, entry.base = self.attempts(entry), 0, self.failures

    def keep_ages(self, seconds: float, now: Now, since: Time = 0.0) -> None:
        """The wall clock jumped so far.  Mail that came after `since`, by the clock
        before, keeps the age it had, and what is left of its lifetime: its hours of arrival are told anew."""
        self.watched_since = now.mono
        for entry in self.entries.values():
            if since <= entry.received <= now.wall - seconds:       # else it was told by another clock, which was right
                entry.received += seconds
                entry.expires += seconds
        self.aging = [(entry.expires, entry.id) for entry in self.entries.values()]
        self.delays = [(self.entries[id].received + self.cfg.delay_notice, id) for _, id in self.delays if id in self.entries]
        heapq.heapify(self.aging)
        heapq.heapify(self.delays)
        self.overdue.clear()


class Memory:
    """What is known of recipients: whether the primary takes them, and until
    when that holds.  Addresses in lower case; RFC 5321 2.4 leaves the case of a local part to
    its host, but no host in use tells them apart."""

    def __init__(self) -> None:
        self.known: Dict[str, Tuple[bool, Time]] = {}       # address: (good, until)
        self.accept_all: Dict[str, Tuple[bool, Time]] = {}  # domain: (takes any local part, until)
        self.is_dirty = False

    def learn(self, address: str, is_good: bool, now: Time) -> None:
        self.known[address.lower()] = (is_good, now + (GOOD_S if is_good else BAD_S))
        self.is_dirty = True
        if len(self.known) > RECIPIENTS_MAX:
            kept = sorted(self.known.items(), key=lambda item: item[1])[-RECIPIENTS_MAX * 9 // 10:]
            self.known = dict(kept)

    def is_good(self, address: str, now: Time) -> bool:
        """Whether this very recipient was taken before."""
        is_good, until = self.known.get(address.lower(), (False, 0.0))
        return is_good and until > now          # however far: who is known to be good is not refused lightly

    def forget_bad(self, domain: str, since: Time) -> None:
        """What a primary that was not itself said since then."""
        end = "@" + domain
        self.known = {address: one for address, one in self.known.items()
                      if one[0] or not address.endswith(end) or one[1] - BAD_S < since}
        self.is_dirty = True

    def forget(self, domain: str) -> None:
        """Another primary has other recipients."""
        self.forget_bad(domain, 0.0)
        self.accept_all.pop(domain, None)

    def learn_accept_all(self, domain: str, takes_all: bool, now: Time) -> None:
        self.accept_all[domain] = (takes_all, now + ACCEPT_ALL_S)
        self.is_dirty = True
        if len(self.accept_all) > RECIPIENTS_MAX:       # all subdomains of a wildcard
            del self.accept_all[next(iter(self.accept_all))]

    def knows(self, address: str, now: Time) -> Optional[bool]:
        """Good, bad, or None when nothing is known."""
        address = address.lower()
        is_good, until = self.known.get(address, (False, 0.0))
        if now < until <= now + (GOOD_S if is_good else BAD_S) + SLACK_S:       # else learnt by a clock that was wrong
            return is_good
        return True if self.takes_all(address.rpartition("@")[2], now) else None

    def takes_all(self, domain: str, now: Time) -> Optional[bool]:
        takes_all, until = self.accept_all.get(domain, (False, 0.0))
        return takes_all if now < until <= now + ACCEPT_ALL_S + SLACK_S else None

    def to_values(self, now: Time) -> Dict[str, Any]:
        self.is_dirty = False
        return {"format": 1, "recipients": {address: list(one) for address, one in self.known.items() if one[1] > now},
                "accept_all": {domain: list(one) for domain, one in self.accept_all.items() if one[1] > now}}

    def from_values(self, values: Mapping[str, Any]) -> None:
        """What does not make sense is forgotten."""
        for name, known in (("recipients", self.known), ("accept_all", self.accept_all)):
            found = values.get(name)
            for key, one in found.items() if isinstance(found, dict) else ():
                if (isinstance(one, list) and len(one) == 2 and isinstance(one[0], bool) and isinstance(one[1], (int, float))
                        and 0 <= one[1] < TIME_MAX):
                    known[key] = (one[0], float(one[1]))


class Persistence:
    """while_up = defer: who comes back is no spammer.  Counts the tries of a client network, sender and recipient."""

    def __init__(self) -> None:
        self.tries: Dict[Tuple[str, str, str], Tuple[Time, int]] = {}       # (first try, number)

    def is_taken(self, address: str, sender: str, recipient: str, now: Time) -> bool:
        key = (greylist_network(address), sender.lower(), recipient.lower())
        first, count = self.tries.pop(key, (now, 0))
        if now - first > 86400.0:
            first, count = now, 0
        self.tries[key] = (first, count + 1)        # at the end: the oldest are first
        if len(self.tries) > PERSISTENCE_MAX:
            del self.tries[next(iter(self.tries))]
        return count + 1 >= PERSISTENCE_TRIES and now - first >= PERSISTENCE_S


class Rate:
    """max_message_rate: messages a minute from one client network."""

    def __init__(self) -> None:
        self.minute = 0
        self.counts: Dict[str, int] = {}

    def is_over(self, network: str, most: int, now: Now) -> bool:
        if int(now.mono // 60) != self.minute:
            self.minute, self.counts = int(now.mono // 60), {}
        self.counts[network] = self.counts.get(network, 0) + 1
        return self.counts[network] > most


class Scheduler:
    """All sites.  Names match whole, or on a dot boundary for `@name`."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.sites: Dict[str, Site] = {}
        self.shared: Dict[str, List[Site]] = {}         # messages that wait at more than one site
        self.extra = self.extra_octets = 0              # what the sites count twice of these
        self.homes: Dict[str, str] = {}     # primary = etrn, by section: where the last authenticated ETRN came from

    def site(self, name: str, now: Now) -> Site:
        site = self.sites.get(name)
        if site is None:
            site = self.sites[name] = Site(name, self.config_of(name), now)
            self._set_home(site)
        return site

    def _set_home(self, site: Site) -> None:
        site.home = self.homes.get(site.cfg.name, "") if site.cfg.primary == "etrn" else ""

    def config_of(self, name: str) -> DomainConfig:
        if not name.startswith((NOTICES, ALERTS)):
            return self.cfg.domain(name) or self.cfg.defaults
        route = self.cfg.bounces_route if name.startswith(NOTICES) else self.cfg.alerts_mail_route
        return dataclasses.replace(
            self.cfg.defaults, name=name, primary=(route,) if isinstance(route, Endpoint) else route, recovery_grace=0.0,
            lifetime=max(self.cfg.defaults.lifetime, NOTICE_LIFETIME_S), connections=NOTICE_CONNECTIONS,
            probe_interval=NOTICE_PROBE_S, etrn="none", is_notices=True)

    def is_served(self, name: str) -> bool:
        return self.cfg.domain(name) is not None

    def meant(self, what: str) -> List[DomainConfig]:
        """The sections that `example.org` or `@example.org` is about; the defaults' when it is none of ours."""
        if what[:1] != "@":
            return [self.config_of(what)]
        return [cfg for name, cfg in self.cfg.domains.items() if is_below(name.lstrip("."), what[1:])] or [
            self.config_of(what[1:])]

    def move(self, cfg: DomainConfig, address: str, now: Now) -> List[Site]:
        """primary = etrn: an authenticated ETRN says where a section's primary
        is now.  Returns the sites it had been elsewhere for."""
        self.homes[cfg.name] = address
        moved = [site for site in self.sites.values() if site.cfg.name == cfg.name and site.home != address]
        for site in moved:
            site.home, site.last_error = address, ""
            site.on_moved(now)
        return moved

    def collected_by(self, username: str, domains: Sequence[str], now: Now) -> List[Site]:
        """What ATRN is for: these domains, or all that are the customer's."""
        names = domains or [name for name in [*self.cfg.domains, *self.sites]
                            if not name.startswith((".", NOTICES, ALERTS)) and self.cfg.is_owned(name, username)]
        return [self.site(name, now) for name in dict.fromkeys(names)]

    def site_of(self, kind: str, domain: str) -> str:
        """The site that delivers a recipient.  Our own mail to domains not
        served goes by [bounces] route or [alerts] mail_route: to a smarthost, or each domain on its own."""
        if kind == "mail" or (kind == "notice" and self.is_served(domain)):
            return domain
        route, prefix = (self.cfg.bounces_route, NOTICES) if kind == "notice" else (self.cfg.alerts_mail_route, ALERTS)
        if isinstance(route, Endpoint):
            return prefix
        return domain if self.is_served(domain) else prefix + domain

    def is_misplaced(self, site: Site) -> bool:
        """Whether a site has mail of our own that site_of() would give to another, since a smarthost came or went."""
        route = self.cfg.bounces_route if site.name.startswith(NOTICES) else self.cfg.alerts_mail_route
        return site.cfg.is_notices and (site.name in (NOTICES, ALERTS)) != isinstance(route, Endpoint)

    def reconfigure(self, cfg: Config, now: Now) -> List[Site]:
        """SIGHUP.  A longer or shorter lifetime holds for queued mail too.  Returns the sites that have another primary now."""
        self.cfg = cfg
        changed = []
        for site in self.sites.values():
            primary, site.cfg = site.cfg.primary, self.config_of(site.name)
            self._set_home(site)
            if site.cfg.primary != primary:
                site.on_replaced(now)
                changed.append(site)
            if site.waits_for and site.state is Primary.DOWN:
                site.state, site.since = Primary.UNKNOWN, now.wall
            site.limit = min(site.limit, site.cfg.connections)
            site.next_probe = min(site.next_probe, now.mono + site.cfg.probe_interval)
            site.aging.clear()
            site.overdue.clear()
            site.delays.clear()
            for entry in site.entries.values():
                entry.expires = entry.received + site.cfg.lifetime
                site.aging.append((entry.expires, entry.id))
                if site.cfg.delay_notice and not site.cfg.is_notices:
                    site.delays.append((entry.received + site.cfg.delay_notice, entry.id))
            heapq.heapify(site.aging)
            heapq.heapify(site.delays)
        return changed

    def matching(self, what: str) -> List[Site]:
        """Sites that `example.org`, `@example.org` or `all` means."""
        if what == "all":
            return list(self.sites.values())
        if what[:1] == "@":
            return [site for name, site in self.sites.items() if is_below(name, what[1:])]
        return [self.sites[name] for name in (what, NOTICES + what, ALERTS + what) if name in self.sites]

    def serves(self, what: str) -> bool:
        """Whether ETRN or a command may name it: served, or for `@name` anything below it served."""
        if what[:1] != "@":
            return self.is_served(what)
        return self.is_served(what[1:]) or any(is_below(name.lstrip("."), what[1:]) for name in self.cfg.domains)

    def holding(self, id: str) -> List[Site]:
        return [site for site in self.sites.values() if id in site.entries]

    def share(self, id: str, sites: List[Site]) -> None:
        """A message waits at these sites, all that it waits at; what that changes in the sums."""
        more = len(sites) - (len(self.shared.get(id, ())) or 1)
        self.shared[id] = sites
        self.extra += more
        self.extra_octets += more * sites[0].entries[id].size

    def drop(self, site: Site, id: str) -> None:
        """A site is done with a message."""
        sites = self.shared.get(id)
        if sites is not None:
            sites.remove(site)
            self.extra -= 1
            self.extra_octets -= site.entries[id].size
            if len(sites) < 2:
                del self.shared[id]
        site.drop(id)

    def messages(self) -> Tuple[int, int, int]:
        """Messages, octets and held ones, a message to two domains counted
        once.  Sums that are kept: the loop may ask with a hundred thousand waiting."""
        count = sum(len(site.entries) for site in self.sites.values()) - self.extra
        octets = sum(site.octets for site in self.sites.values()) - self.extra_octets
        held = sum(site.count[State.HOLD] for site in self.sites.values())
        if held:                        # then one may be held at both its sites
            held -= sum(max(0, sum(site.entries[id].state is State.HOLD for site in sites) - 1)
                        for id, sites in self.shared.items())
        return count, octets, held


# == 9. DNS ====================================================================
# Packets built and parsed (pure), then one short resolver that sends them.
# It runs in delivery threads.  RFC 1035, RFC 5452 (answers nobody forged),
# RFC 6891 (EDNS), RFC 7505 (null MX).

A, CNAME, PTR, MX, AAAA = 1, 5, 12, 15, 28
NOERROR, FORMERR, NXDOMAIN, NOTIMP = 0, 1, 3, 4


class DnsError(Exception):
    """No usable answer.  For the primary's mail this is always temporary."""


class Answer(NamedTuple):
    rcode: int
    truncated: bool
    records: List[Any]          # A, AAAA: address; MX: (preference, host); PTR: host


def format_query(id: int, name: str, kind: int, edns: bool = True) -> bytes:
    out = struct.pack("!HHHHHH", id, 0x0100, 1, 0, 0, 1 if edns else 0)     # recursion desired
    for label in name.split("."):
        out += bytes([len(label)]) + label.encode("ascii")
    out += b"\0" + struct.pack("!HH", kind, 1)
    return out + (b"\0" + struct.pack("!HHIH", 41, DNS_UDP_MAX, 0, 0) if edns else b"")


def parse_name(packet: bytes, at: int) -> Tuple[str, int]:
    """The name at an offset and the offset behind it.  Pointers must lead
    backwards, so that no packet makes a loop.  Raises DnsError."""
    labels: List[str] = []
    behind, lowest, length = -1, at, 0
    while True:
        if at >= len(packet):
            raise DnsError("name runs out of the packet")
        size = packet[at]
        if size >= 0xc0:
            if at + 1 >= len(packet):
                raise DnsError("pointer runs out of the packet")
            target = (size & 0x3f) << 8 | packet[at + 1]
            if behind < 0:
                behind = at + 2
            if target >= lowest:
                raise DnsError("pointer that does not lead backwards")
            at = lowest = target
            continue
        if size > 63:
            raise DnsError("label of an unknown kind")
        label = packet[at + 1:at + 1 + size]
        if len(label) < size:
            raise DnsError("label runs out of the packet")
        at += 1 + size
        if not size:
            return ".".join(labels), behind if behind >= 0 else at
        length += size + 1
        if length > 255:
            raise DnsError("name too long")
        labels.append(label.decode("latin-1").lower())


def parse_answer(packet: bytes, id: int, name: str, kind: int) -> Optional[Answer]:
    """None when the packet answers another question (it is ignored, RFC 5452
    9.1).  CNAMEs are followed within the packet.  Raises DnsError."""
    if len(packet) < 12:
        return None
    got, flags, questions, answers = struct.unpack("!HHHH", packet[:8])
    if got != id or not flags & 0x8000 or questions != 1:
        return None
    asked, at = parse_name(packet, 12)
    if asked != name.lower() or packet[at:at + 4] != struct.pack("!HH", kind, 1):
        return None
    rcode, truncated = flags & 15, bool(flags & 0x0200)
    if truncated:
        return Answer(rcode, True, [])
    at += 4
    found: Dict[str, List[Any]] = {}
    aliases: Dict[str, str] = {}
    for _ in range(min(answers, DNS_RECORDS_MAX)):
        owner, at = parse_name(packet, at)
        if at + 10 > len(packet):
            raise DnsError("record runs out of the packet")
        its_kind, its_class, _, size = struct.unpack("!HHIH", packet[at:at + 10])
        at += 10
        if at + size > len(packet):
            raise DnsError("record data runs out of the packet")
        if its_class == 1 and its_kind == CNAME:
            aliases[owner] = parse_name(packet, at)[0]
        elif its_class == 1 and its_kind == kind:
            found.setdefault(owner, []).append(_parse_data(packet, at, size, kind))
        at += size
    for _ in range(DNS_CNAMES_MAX):
        if asked in found or asked not in aliases:
            break
        asked = aliases[asked]
    return Answer(rcode, False, found.get(asked, []))


def _parse_data(packet: bytes, at: int, size: int, kind: int) -> Any:
    if (kind == A and size != 4) or (kind == AAAA and size != 16) or (kind == MX and size < 3):
        raise DnsError("record data of a wrong size")
    if kind in (A, AAAA):
        return str(ipaddress.ip_address(packet[at:at + size]))
    if kind == MX:
        return struct.unpack("!H", packet[at:at + 2])[0], parse_name(packet, at + 2)[0]
    return parse_name(packet, at)[0]


def read_resolv_conf(path: str) -> Tuple[Endpoint, ...]:
    """The nameservers of a resolv.conf; none is this host, as resolv.conf(5) says."""
    out = []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                words = line.split()
                if len(words) > 1 and words[0] == "nameserver":
                    out.append(Endpoint(words[1], 53))
    except OSError:
        pass
    return tuple(out[:3]) or (Endpoint("127.0.0.1", 53),)


class Resolver:
    """Asks the nameservers in turn, two rounds; keeps nothing."""

    def __init__(self, nameservers: Union[str, Tuple[Endpoint, ...]]) -> None:
        self.nameservers = nameservers

    def query(self, name: str, kind: int, seconds: Optional[float] = None) -> List[Any]:
        """Records, or an empty list when the name has none of that kind.
        Raises DnsError: no such name, or nobody answers."""
        servers = read_resolv_conf(self.nameservers) if isinstance(self.nameservers, str) else self.nameservers
        end = time.monotonic() + (seconds or DNS_TOTAL_S)
        problem = "no answer"
        for server in servers * 2:
            left = end - time.monotonic()
            if left <= 0:
                break
            try:
                answer = self._ask(server, name, kind, min(DNS_TRY_S, left))
            except (OSError, DnsError, struct.error) as error:
                problem = "%s: %s" % (server, error)
                continue
            if answer.rcode == NXDOMAIN:
                raise DnsError("no such name: %s" % name)
            if answer.rcode == NOERROR:
                return answer.records
            problem = "%s: error code %d" % (server, answer.rcode)
        raise DnsError("DNS lookup of %s failed: %s" % (name, problem))

    def _ask(self, server: Endpoint, name: str, kind: int, seconds: float) -> Answer:
        answer = self._ask_udp(server, name, kind, seconds, True)
        if answer.rcode in (FORMERR, NOTIMP):
            answer = self._ask_udp(server, name, kind, seconds, False)      # an old forwarder that knows no EDNS
        return self._ask_tcp(server, name, kind, seconds) if answer.truncated else answer

    @staticmethod
    def _ask_udp(server: Endpoint, name: str, kind: int, seconds: float, edns: bool) -> Answer:
        """A fresh socket and so a fresh port for each question, RFC 5452 9.2."""
        id = secrets.randbits(16)
        end = time.monotonic() + seconds
        with socket.socket(socket.AF_INET6 if ":" in server.host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((server.host, server.port))
            sock.send(format_query(id, name, kind, edns))
            while True:
                sock.settimeout(max(0.001, end - time.monotonic()))
                answer = parse_answer(sock.recv(65535), id, name, kind)
                if answer is not None:
                    return answer
                if time.monotonic() >= end:
                    raise DnsError("only answers to other questions")

    @staticmethod
    def _ask_tcp(server: Endpoint, name: str, kind: int, seconds: float) -> Answer:
        id = secrets.randbits(16)
        end = time.monotonic() + seconds
        with socket.create_connection((server.host, server.port), seconds) as sock:
            query = format_query(id, name, kind)
            sock.sendall(struct.pack("!H", len(query)) + query)
            data = b""
            while len(data) < 2 or len(data) < 2 + struct.unpack("!H", data[:2])[0]:
                sock.settimeout(max(0.001, end - time.monotonic()))
                block = sock.recv(65535)
                if not block or time.monotonic() >= end:
                    raise DnsError("answer breaks off")
                data += block
        answer = parse_answer(data[2:], id, name, kind)
        if answer is None or answer.truncated:
            raise DnsError("answer to another question")
        return answer

    def addresses(self, host: str) -> List[str]:
        """At least one, IPv4 first: a host with broken IPv6 is common, one with broken IPv4 is not.
        The system resolver is asked, with /etc/hosts, unless nameservers are configured."""
        try:
            return [str(ipaddress.ip_address(host))]
        except ValueError:
            pass
        try:
            host.encode("ascii")
            host = parse_domain(host)
        except ValueError:              # an MX record may hold any octets
            raise DnsError("not a host name: %s" % printable(host, 100)) from None
        if isinstance(self.nameservers, str):
            try:
                found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            except (OSError, UnicodeError) as error:
                raise DnsError("lookup of %s failed: %s" % (host, error)) from None
            out = [str(entry[4][0]) for entry in found]
        else:
            out = self._both_kinds(host)
        if not out:
            raise DnsError("no address is known for %s" % host)
        return list(dict.fromkeys(sorted(out, key=lambda address: ":" in address)))

    def name_of(self, address: str) -> str:
        """The name of a client, when it leads back to the address; else empty.  Raises DnsError when nobody knows now."""
        pointer = ipaddress.ip_address(address.partition("%")[0]).reverse_pointer
        try:
            for name in self.query(pointer, PTR, DNS_TRY_S)[:3]:
                if address in self.query(parse_domain(name), AAAA if ":" in address else A, DNS_TRY_S):
                    return str(parse_domain(name))
        except ValueError:
            pass                        # no name of a host
        except DnsError as error:
            if "no such name" not in str(error):
                raise
        return ""

    def _both_kinds(self, host: str) -> List[str]:
        """A and AAAA.  A server that knows the one and fails at the other is a
        common fault; it is not waited for."""
        out: List[str] = []
        problem: Optional[DnsError] = None
        for kind in (A, AAAA):
            try:
                out += self.query(host, kind, DNS_TRY_S if out else None)
            except DnsError as error:
                problem = error
        if problem and not out:
            raise problem
        return out


# == 10. DSN ===================================================================
# Outcomes in, the bytes of a delivery status notification out: RFC 3461 to
# 3464 and 3834.  Pure.  Foreign text passes printable() and is cut, so that no
# reply of a strange server puts a header or a boundary into our mail.

class Report(NamedTuple):
    """What a notice says of one recipient."""
    address: str
    action: str                 # failed, delayed or relayed
    status: str                 # RFC 3463
    response: str               # the last answer, or our own words
    remote: str                 # host that gave it, or empty
    orcpt: str
    attempts: int
    last_attempt: Optional[Time]


def utf8_xtext(address: str) -> str:
    """`rfc822; a@b`, or the ASCII form of an internationalized address, RFC 6533 3."""
    if address.isascii():
        return "rfc822; " + printable(address)
    return "utf-8; " + _utf8_escaped(address)


def _utf8_escaped(text: str) -> str:
    return "".join(c if c.isascii() else "\\x{%X}" % ord(c) for c in printable(text))


def _ascii(text: str, longest: int = RESPONSE_MAX) -> str:
    return printable(text, longest).encode("ascii", "backslashreplace").decode("ascii")


_SUBJECTS = {"failed": "Undelivered Mail Returned to Sender", "delayed": "Delayed Mail (still being retried)",
             "relayed": "Mail relayed"}


def format_notice(hostname: str, target: str, sidecar: Mapping[str, Any], reports: Sequence[Report], original: bytes,
                  full: bool, now: Time, boundary: str, message_id: str) -> bytes:
    """The message to `target`; `original` is the header of what could not be delivered, or all of it when `full`."""
    boundary = "%s/%s" % (boundary, hostname)
    text = "\r\n".join(_explain(hostname, sidecar, reports, now))
    status = "\r\n".join(_status_part(hostname, sidecar, reports) + [""])
    is_global = any(not report.address.isascii() or report.orcpt[:6].lower() == "utf-8;" for report in reports)
    returned = original if full else _fold_octets(original)
    kind = {(True, True): "message/global", (True, False): "message/rfc822",       # RFC 6533 5
            (False, True): "message/global-headers", (False, False): "text/rfc822-headers"}[full, bool(sidecar["smtputf8"])]
    parts = [("Notification", "text/plain; charset=%s" % ("us-ascii" if text.isascii() else "utf-8"), text.encode("utf-8")),
             ("Delivery report", "message/global-delivery-status" if is_global else "message/delivery-status",
              status.encode("ascii")),
             ("Undelivered Message" if full else "Undelivered Message Headers", kind, returned)]
    head = ["From: Mail Delivery System <MAILER-DAEMON@%s>" % hostname, "To: <%s>" % target,
            "Subject: %s" % _SUBJECTS[reports[0].action], "Date: %s" % email.utils.formatdate(now, localtime=True),
            "Message-ID: <%s@%s>" % (message_id, hostname), *_references(original),
            "Auto-Submitted: auto-replied", "MIME-Version: 1.0",
            'Content-Type: multipart/report; report-type=delivery-status;\r\n\tboundary="%s"' % boundary]
    head += ["Content-Transfer-Encoding: 8bit"] * any(_is_8bit(data) for _, _, data in parts)
    out = [line.encode("utf-8") for line in head + ["", "This is a MIME-encapsulated message.", ""]]
    for description, kind, data in parts:
        fields = ["--" + boundary, "Content-Description: " + description, "Content-Type: " + kind]
        fields += ["Content-Transfer-Encoding: 8bit"] * _is_8bit(data)
        out += [line.encode("ascii") for line in fields] + [b"", data]
    return b"\r\n".join(out) + ("\r\n--%s--\r\n" % boundary).encode("ascii")


def _is_8bit(data: bytes) -> bool:
    return not data.isascii()


def _references(original: bytes) -> List[str]:
    """The thread it belongs to, RFC 3834 3.1.5; only what cannot be anything else."""
    header = original[:HEADER_SCAN_MAX].partition(b"\r\n\r\n")[0]
    found = re.search(rb"(?im)^message-id:[ \t]*(<[!-;=?-~]{3,250}>)[ \t]*\r?$", header)
    return ["%s: %s" % (name, found.group(1).decode("ascii")) for name in ("In-Reply-To", "References")] if found else []


def _fold_octets(header: bytes) -> bytes:
    """A header whose lines fit into mail, RFC 5322 2.1.1."""
    lines = header.split(b"\r\n")
    if max(map(len, lines)) <= LINE_MAX:
        return header
    return b"\r\n".join(b"\r\n ".join(line[at:at + LINE_MAX] for at in range(0, len(line) or 1, LINE_MAX)) for line in lines)


def _fold(field: str) -> str:
    """A field of ours, folded at blanks, RFC 5322 2.2.3."""
    return "\r\n ".join(_wrap(field, FOLD_WIDTH))


def _status_part(hostname: str, sidecar: Mapping[str, Any], reports: Sequence[Report]) -> List[str]:
    out = ["Reporting-MTA: dns; %s" % hostname]
    if sidecar["envid"]:
        out.append("Original-Envelope-Id: %s" % _ascii(decode_xtext(sidecar["envid"])))
    out += ["X-Relay-Queue-ID: %s" % sidecar["id"],
            "Arrival-Date: %s" % email.utils.formatdate(sidecar["received"], localtime=True)]
    for report in reports:
        out += [""] + _report_fields(report)
        if report.action == "delayed":
            out.append("Will-Retry-Until: %s" % email.utils.formatdate(_expires(sidecar, report), localtime=True))
    return out


def _expires(sidecar: Mapping[str, Any], report: Report) -> Time:
    return float(max(one["expires"] for one in sidecar["recipients"] if one["address"] == report.address))


def _report_fields(report: Report) -> List[str]:
    out = []
    if report.orcpt:
        kind, _, address = report.orcpt.partition(";")
        out.append("Original-Recipient: %s; %s" % (kind, _utf8_escaped(
            decode_xtext(address) if kind.lower() != "utf-8" else address)))
    out += ["Final-Recipient: %s" % utf8_xtext(report.address), "Action: %s" % report.action,
            "Status: %s" % report.status]
    if report.remote:
        out.append("Remote-MTA: dns; %s" % _ascii(report.remote, 255))
    if report.response:
        kind = "smtp" if re.match(r"[2-5]\d\d[ -]", report.response) else "X-etrn-relay"
        out.append(_fold("Diagnostic-Code: %s; %s" % (kind, _ascii(report.response))))
    if report.last_attempt:
        out.append("Last-Attempt-Date: %s" % email.utils.formatdate(report.last_attempt, localtime=True))
    return out


# What a status or an error means, and what its reader can do, for people who do not know what SMTP is.  Searched in
# this order in "STATUS RESPONSE", where STATUS is the peer's own when it gave one.
_ASK = "Reach the addressee in another way, for example by telephone, and ask."
_AGAIN = "If it still matters, send it again later, or reach the addressee in another way."
_MEANINGS: Tuple[Tuple[str, str, str], ...] = (
    (r"^[45]\.1\.[016]\b", "There is no such mailbox at this domain.",
     "Compare the address letter by letter with the right one; " + _ASK[0].lower() + _ASK[1:]),
    (r"^[45]\.2\.2\b", "The addressee's mailbox is full.", "Tell the addressee in another way, and send it again later."),
    (r"^[45]\.2\.1\b", "The addressee's mailbox takes no mail.", _ASK),
    (r"^[45]\.(3\.4|2\.3)\b", "The message is larger than the addressee's mail server takes.",
     "Send it in smaller parts, or large files in another way."),
    (r"^[45]\.6\.7\b", "The message or an address in it has letters that the addressee's mail server cannot handle.",
     "Use an address in plain letters (a to z) for the sender and the addressee."),
    (r"Connection refused", "The addressee's computer is there, but its mail service is not running.", _AGAIN),
    (r"timed out", "The addressee's mail server does not answer.", _AGAIN),
    (r"unreachable|No route to host", "The addressee's mail server cannot be reached over the network.", _AGAIN),
    (r"no such name|DNS lookup|no address is known", "The address of the addressee's mail server cannot be found.", _AGAIN),
    (r"loops back", "No mail server is known for this domain other than its backup servers.", _AGAIN),
    (r"null MX", "The domain declares that it takes no mail.", _ASK),
    (r"lost connection|ended the connection|reply of .* is not SMTP|reply from|not asked for|answers RSET",
     "The addressee's mail server broke the conversation off.", _AGAIN),
    (r"Returned by the postmaster", "The postmaster of the backup mail server returned it.", _AGAIN),
    (r"^[45]\.7\.\d", "The addressee's mail server does not want this message, or not from this sender.", _ASK),
    (r"^4|^\S+ 4\d\d[ -]", "The addressee's mail server put the message off again and again.", _AGAIN),
    (r"", "The addressee's mail server refused the message.", _ASK),
)


def meaning_of(report: Report) -> Tuple[str, str]:
    """In words: what happened, and what to do about it."""
    own = re.match(r"[45]\d\d ([45]\.\d{1,3}\.\d{1,3})\b", report.response)
    text = "%s %s" % (own.group(1) if own else report.status, report.response)
    return next((why, what) for pattern, why, what in _MEANINGS if re.search(pattern, text))


def format_age(seconds: float) -> str:
    """For people who read a sentence: 3 days and 2 hours."""
    out: List[str] = []
    left = max(1, int(seconds))
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)):
        if left >= size and len(out) < 2:
            out.append("%d %s%s" % (left // size, unit, "" if left // size == 1 else "s"))
            left %= size
        elif out:
            break
    return " and ".join(out)


def _explain(hostname: str, sidecar: Mapping[str, Any], reports: Sequence[Report], now: Time) -> List[str]:
    """For a reader who does not know what SMTP is."""
    action = reports[0].action
    since = email.utils.formatdate(sidecar["received"], localtime=True)
    if not sidecar["sender"]:
        out = ["For the postmaster: a message of %s," % since,
               "which has no sender who could be told, could not be delivered to:"]
    elif action == "failed":
        out = ["Your message of %s" % since, "could not be delivered to:"]
    elif action == "delayed":
        out = ["Your message of %s" % since, "has not been delivered yet to the addresses below.  You need not send it",
               "again: it is kept here and will be delivered as soon as possible to:"]
    else:
        out = ["Your message of %s" % since, "was handed on to a mail server that sends no confirmations:"]
    for report in reports:
        out += ["", "  <%s>" % printable(report.address, 320)]
        out += ["    " + line for line in _explain_one(sidecar, report, now)]
    if action == "failed" and sidecar["sender"]:
        out += ["", "It will not be tried again."]
        for advice in dict.fromkeys(meaning_of(report)[1] for report in reports):
            out += _wrap(advice, 72)
    return out + ["", "This notice was made by %s, a backup mail server of the" % hostname, "addressee's domain.", ""]


def _explain_one(sidecar: Mapping[str, Any], report: Report, now: Time) -> List[str]:
    out: List[str] = []
    if report.action != "relayed":
        out += _wrap(meaning_of(report)[0], 66)
        last = ", the last time on %s" % email.utils.formatdate(report.last_attempt, localtime=True)
        tried = "It was tried for %s (%d attempt%s%s)." % (
            format_age(now - sidecar["received"]), report.attempts, "" if report.attempts == 1 else "s",
            last if report.last_attempt else "")
        waited = "It waited for %s%s." % (format_age(now - sidecar["received"]),
                                          " to be collected" if report.response == UNCOLLECTED else "")
        out += _wrap(tried if report.attempts else waited, 66)
    if report.action == "delayed":
        out += _wrap("It will be tried until %s." % email.utils.formatdate(_expires(sidecar, report), localtime=True), 66)
    if report.response:
        out.append("%s:" % ("The mail server %s said" % _ascii(report.remote, 255) if report.remote else "The last result was"))
        out += ["  " + line for line in _wrap(_ascii(report.response), 66)]
    return out


def _wrap(text: str, width: int) -> List[str]:
    out = [""]
    for word in text.split(" "):
        if len(out[-1]) + len(word) >= width and out[-1]:
            out.append("")
        out[-1] += (" " if out[-1] else "") + word
    return out


# == 11. DELIVERY ==============================================================
# One thread a connection: find the route, connect, send the messages it is given.
# Reports to the loop through post(); never raises past its edge.

class PeerError(Exception):
    """The connection is of no more use.  Always temporary for the mail."""

    def __init__(self, text: str, closing: bool = False) -> None:
        super().__init__(text)
        self.closing = closing          # the peer said so, with 421


class Plan(NamedTuple):
    """All that a connection needs to know; nothing in it changes."""
    site: str
    cfg: DomainConfig
    primary: Union[str, Tuple[Endpoint, ...]]
    hostname: str
    resolver: Resolver
    listeners: Tuple[Endpoint, ...]     # ours, as bound
    last_route: Tuple[Hop, ...]         # used when the DNS fails
    login: Optional[Tuple[str, str]] = None     # at a smarthost
    chunking: bool = True               # used, where offered
    is_wary: bool = False               # the connection before broke with several messages in flight


class Job(NamedTuple):
    id: str
    domain: str                 # whose recipients are meant; empty for all


class Result(NamedTuple):
    """What became of one recipient."""
    address: str
    kind: str                   # sent, deferred or refused
    status: str                 # RFC 3463, for dsn=
    response: str               # as the peer said it, or our words
    remote: str                 # host that said it
    refused_since: Optional[Time]       # from the sidecar
    is_good: Optional[bool] = None      # what RCPT's answer says of the recipient itself
    is_content: bool = False    # the message was judged, not the envelope
    is_told: bool = True        # the next host took over the duty to report success, RFC 3461 5.2


class Settled(Exception):
    """The sidecar says that nothing of the job is left to do."""


class Outcome(NamedTuple):
    """Of one job.  `results` is empty when it was not tried: `fault` says why, or it is to be given back."""
    courier: "Courier"
    job: Job
    results: Tuple[Result, ...]
    is_whole: bool              # the message has no other recipients left than these
    received: Time
    relay: str
    seconds: float
    fault: Optional[Exception] = None
    wants_report: bool = False  # NOTIFY=SUCCESS, and the next host does not see to it
    pace_s: float = 1.0         # since the answer before on the same connection
    can_wait: bool = False      # the loop need not be woken for it: it will look within GATHER_S


class Routed(NamedTuple):
    line: "Line"
    hops: Tuple[Hop, ...]
    warning: str


class Greeted(NamedTuple):
    courier: "Courier"
    hop: Hop
    size_limit: int


class Finished(NamedTuple):
    courier: "Courier"
    error: str                  # empty when the connection ended in good order
    bug: Optional[BaseException] = None


def is_local(address: str) -> bool:
    """Whether this machine has the address: only then can a socket be bound to it."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((address, 0))
        return True
    except OSError:
        return False


def is_own(hop: Hop, listeners: Sequence[Endpoint]) -> bool:
    """Whether connecting there would reach this relay itself."""
    for listener in listeners:
        if listener.port == hop.port:
            if listener.host == hop.address:
                return True
            if listener.host in ("0.0.0.0", "::") and is_local(hop.address):
                return True
    return False


def find_route(plan: Plan) -> Tuple[List[Hop], str]:
    """Hosts to try in order, and a warning when they are remembered ones.
    Raises PeerError: whatever the DNS says, the mail is kept."""
    if plan.primary in WAITS:
        raise PeerError("mail for %s %s" % (plan.site, WAITS[str(plan.primary)]))
    try:
        hops = _mx_route(plan) if plan.primary == "mx" else _host_route(plan)
        return hops[:ROUTE_HOSTS_MAX], ""
    except DnsError as error:
        if plan.last_route:
            return list(plan.last_route), "%s; using the route that worked last" % error
        raise PeerError(str(error)) from None


def _host_route(plan: Plan) -> List[Hop]:
    hops: List[Hop] = []
    problem = DnsError("no primary is configured")
    for where in plan.primary:
        assert isinstance(where, Endpoint)
        try:
            hops += [Hop(where.host, address, where.port) for address in plan.resolver.addresses(where.host)]
        except DnsError as error:
            problem = error
    if not hops:
        raise problem
    others = [hop for hop in hops if not is_own(hop, plan.listeners)]
    if not others:
        raise PeerError("mail for %s loops back to this host: %s" % (plan.site, hops[0]))
    return others


def _mx_route(plan: Plan) -> List[Hop]:
    """RFC 5321 5.1.  Neither this host nor anything of equal or higher
    preference; equal ones in random order.  Notices, whose targets strangers
    choose, go to public addresses only."""
    domain = plan.site.partition(":")[2] if plan.cfg.is_notices else plan.site
    if domain.startswith("["):
        hops = [Hop(domain, parse_literal(domain), SMTP_PORT)]
    else:
        hops = _mx_hops(plan, domain)
    if plan.cfg.is_notices:
        hops = [hop for hop in hops if ipaddress.ip_address(hop.address).is_global and not is_own(hop, plan.listeners)]
    if not hops:
        raise PeerError("mail for %s has no route to a public address" % domain)
    return hops


def _mx_hops(plan: Plan, domain: str) -> List[Hop]:
    found: List[Tuple[int, str]] = plan.resolver.query(domain, MX)
    records = [one for one in found if one[1]]
    if found and not records:           # RFC 7505
        raise PeerError("%s has a null MX record: it says it takes no mail" % domain)
    hops: List[Hop] = []
    problem: Optional[DnsError] = None
    for _, group in itertools.groupby(sorted(records) or [(0, domain)], key=lambda record: record[0]):
        hosts = [host for _, host in group]
        random.shuffle(hosts)
        equal: List[Hop] = []
        for host in hosts:
            try:
                equal += [Hop(host, address, SMTP_PORT) for address in plan.resolver.addresses(host)]
            except DnsError as error:
                problem = error
        if plan.hostname in hosts or any(is_own(hop, plan.listeners) for hop in equal):
            if not hops and not problem:
                raise PeerError("mail for %s loops back to this host: no MX host is preferred to it" % domain)
            break                       # neither this host nor its equals nor what is behind it
        hops += equal
        if len(hops) >= ROUTE_HOSTS_MAX:
            break
    if problem and not hops:
        raise problem
    return hops


def begin_connect(hop: Hop) -> socket.socket:
    """A socket on its way to a host.  Raises OSError, also where the kernel has no IPv6."""
    sock = socket.socket(socket.AF_INET6 if ":" in hop.address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        code = sock.connect_ex((hop.address, hop.port))
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, os.strerror(code))
    except OSError:
        sock.close()
        raise
    return sock


def connect_each(hops: Sequence[Hop]) -> Iterator[Tuple[Hop, Union[socket.socket, OSError]]]:
    """Hosts in order, each with a connected socket or the reason why not.  One
    that does not answer is not waited for: the next is tried beside it after a
    moment (RFC 8305 5), so that a dead address family or a dead first host costs nothing."""
    waiting = list(hops)
    trying: Dict[socket.socket, Hop] = {}
    end = 0.0
    with selectors.DefaultSelector() as selector:
        try:
            while waiting or trying:
                if waiting:
                    hop = waiting.pop(0)
                    end = time.monotonic() + CONNECT_S
                    try:
                        sock = begin_connect(hop)
                    except OSError as error:
                        yield hop, error
                        continue
                    selector.register(sock, selectors.EVENT_WRITE)
                    trying[sock] = hop
                pause = end - time.monotonic()
                if waiting:
                    pause = STAGGER_S if waiting[0].host == hop.host else HOST_STAGGER_S
                for key, _ in selector.select(max(0.0, pause)):
                    sock = key.fileobj          # type: ignore[assignment]
                    selector.unregister(sock)
                    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if code:
                        sock.close()
                        yield trying.pop(sock), OSError(code, os.strerror(code))
                    else:
                        sock.setblocking(True)
                        yield trying.pop(sock), sock
                if not waiting and time.monotonic() >= end:
                    for hop in trying.values():
                        yield hop, OSError(errno.ETIMEDOUT, "Connection timed out")
                    return
        finally:
            for sock in trying:
                sock.close()


class LostError(PeerError):
    """The peer takes no more.  What it said before can still be read."""


class TlsError(PeerError):
    """STARTTLS was offered but did not come about."""


WANTS: Tuple[Type[BaseException], ...] = (BlockingIOError, InterruptedError)      # a socket has nothing for us now
if ssl is not None:
    WANTS += (ssl.SSLWantReadError, ssl.SSLWantWriteError)


def client_context(policy: str) -> "ssl.SSLContext":
    """Certificates are verified only where the option says so: as between mail
    servers everywhere, opportunistic TLS is against listeners, not against liars."""
    context = ssl.create_default_context()
    if policy != "verify":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class Client(smtplib.SMTP):
    """smtplib's client with a total deadline and a bounded size for each reply,
    which is read strictly: smtplib takes garbage for codes like -1 and waits
    anew for every octet.  Addresses are ours, checked; quoteaddr() would
    rewrite them.  The socket never blocks: a call first and a wait where it
    must be is half the system calls of a socket with a timeout, and a new one for each."""

    def __init__(self, hostname: str) -> None:
        super().__init__(local_hostname=hostname, timeout=CONNECT_S)
        self.pending = b""
        self.end = 0.0                  # monotonic, of the reply being read
        self.moved = time.monotonic()   # when octets last went either way
        self.ready: Optional[socket.socket] = None

    def open(self, hop: Hop, sock: socket.socket, seconds: float = 0.0) -> None:
        """Be greeted on a connected socket.  A 5xx greeting says nothing about the mail."""
        self._host = hop.host
        self.ready = sock
        sock.setblocking(False)
        self.wait(seconds or CONNECT_S)
        try:
            code, text = self.connect(hop.address, hop.port)
        except OSError as error:
            raise PeerError("connect to %s: %s" % (hop.where, error.strerror or error)) from None
        if code != 220:
            raise PeerError("%s refused to talk to us: %s" % (hop, reply_text(code, text)), code == 421)
        name = text.split(b" ")[0].decode("ascii", "replace").lower()
        if name == self.local_hostname.lower():
            raise PeerError("mail loops back to this host: %s greets with our own name" % str(hop))

    def _get_socket(self, host: Any, port: Any, timeout: Any) -> socket.socket:
        """smtplib's own hook for how a connection is made."""
        assert self.ready is not None
        return self.ready

    def hello(self, name: str = "") -> None:
        """EHLO with our own name, or after XCLIENT with the client's: Postfix takes the one said last."""
        self.wait(COMMAND_S)
        code, text = self.ehlo(name)
        if 500 <= code:
            self.esmtp_features = {}
            code, text = self.helo(name)        # RFC 5321 3.2
        if code != 250:
            raise PeerError("host %s refused our greeting: %s" % (self._host, reply_text(code, text)), code == 421)

    def wait(self, seconds: float) -> None:
        """The next reply must be complete within so many seconds."""
        self.end = time.monotonic() + seconds

    def write(self, data: bytes, seconds: float = BLOCK_S) -> None:
        """Raises PeerError unless all of it has left within so many seconds."""
        assert self.sock is not None
        end, rest = time.monotonic() + seconds, memoryview(data)
        while rest:
            rest = rest[self._when_ready(self.sock.send, rest, select.POLLOUT, end):]

    def send(self, s: Any) -> None:
        """smtplib's own way to say something."""
        self.write(s.encode(self.command_encoding) if isinstance(s, str) else bytes(s))

    def _when_ready(self, call: Callable[[Any], Any], argument: Any, mask: int, end: float) -> Any:
        """The result of a call of the socket, as soon as there is one."""
        while True:
            try:
                done = call(argument)
                self.moved = time.monotonic()
                return done
            except WANTS as want:       # TLS may have to read before it can write
                if ssl is not None and isinstance(want, ssl.SSLError):
                    mask = select.POLLIN if isinstance(want, ssl.SSLWantReadError) else select.POLLOUT
            except OSError as error:
                raise LostError("lost connection with %s: %s" % (self._host, error.strerror or error)) from None
            left = end - time.monotonic()
            if left <= 0:
                raise PeerError("conversation with %s timed out" % self._host)
            assert self.sock is not None
            poller = select.poll()
            poller.register(self.sock, mask)
            poller.poll(left * 1000)

    def getreply(self) -> Tuple[int, bytes]:
        lines: List[bytes] = []
        code, size = b"", 0
        while True:
            line = self._line()
            size += len(line)
            if size > REPLY_OCTETS_MAX or len(lines) >= REPLY_LINES_MAX:
                raise PeerError("endless reply from %s" % self._host)
            if not re.match(rb"[2-5][0-9][0-9](?:[ -]|$)", line) or line[:3] != (code or line[:3]):
                raise PeerError("reply of %s is not SMTP: %s" % (self._host, printable(line[:100].decode("latin-1"))))
            code = line[:3]
            lines.append(line[4:])
            if line[3:4] != b"-":
                return int(code), b"\n".join(lines)

    def _line(self) -> bytes:
        assert self.sock is not None
        while True:
            at = self.pending.find(b"\n")
            if at >= 0:
                line, self.pending = self.pending[:at], self.pending[at + 1:]
                return line.rstrip(b"\r")
            if len(self.pending) > REPLY_OCTETS_MAX:
                raise PeerError("over-long reply from %s" % self._host)
            data = self._when_ready(self.sock.recv, 65536, select.POLLIN, self.end)
            if not data:
                raise PeerError("lost connection with %s" % self._host)
            self.pending += data

    def is_silent(self) -> bool:
        """Whether an idle connection is still of use: neither closed nor saying
        421.  TLS has traffic of its own, so that readable is not enough."""
        assert self.sock is not None
        try:
            self.pending += self.sock.recv(1024)
        except WANTS:
            return not self.pending
        except OSError:
            pass
        return False

    def secure(self, policy: str) -> None:
        """STARTTLS as the `tls` option says.  Raises PeerError: temporary in any
        case.  TlsError: the same, but `may` allows a new connection in the clear."""
        if policy == "none" or ssl is None:
            if policy not in ("none", "may"):
                raise PeerError("tls = %s, but this Python has no ssl module" % policy)
            return
        if "starttls" not in self.esmtp_features:
            if policy != "may":
                raise PeerError("%s does not offer STARTTLS, and tls = %s" % (self._host, policy.partition(":")[0]))
            return
        try:
            code, text = self.ask_tls()
            if code != 220:
                raise TlsError("%s answers STARTTLS with %s" % (self._host, reply_text(code, text)))
            if self.pending:            # a forged reply waiting to be taken for one from within TLS
                raise TlsError("%s sends data behind its STARTTLS reply" % self._host)
            assert self.sock is not None
            self.sock.settimeout(CONNECT_S)
            self.sock = client_context(policy).wrap_socket(self.sock, server_hostname=self._host)
            self.sock.setblocking(False)
        except (OSError, ValueError) as error:
            raise TlsError("TLS with %s failed: %s" % (self._host, printable(str(error), 200))) from None
        self.check_pin(policy)
        self.helo_resp = self.ehlo_resp = None
        self.esmtp_features = {}
        try:
            self.hello()                # what was offered in the clear does not count, RFC 3207 4.2
        except PeerError as error:
            if error.closing:
                raise
            raise TlsError(str(error)) from None        # TLS 1.3 shows only now that the other side did not agree

    def ask_tls(self) -> Tuple[int, bytes]:
        self.wait(COMMAND_S)
        try:
            code, text = self.docmd("STARTTLS")
        except PeerError as error:      # it offers what makes it fall over
            raise TlsError("STARTTLS: %s" % error) from None
        if code == 421:
            raise PeerError("%s: %s" % (self._host, reply_text(code, text)), True)
        return code, text

    def check_pin(self, policy: str) -> None:
        if policy.startswith("sha256:"):
            assert isinstance(self.sock, ssl.SSLSocket)
            found = hashlib.sha256(self.sock.getpeercert(binary_form=True) or b"").hexdigest()
            if found != policy[7:]:
                raise PeerError("the certificate of %s is not the pinned one: sha256:%s" % (self._host, found))


def reply_text(code: int, text: bytes) -> str:
    return printable("%d %s" % (code, text.decode("utf-8", "replace").replace("\n", " ")), RESPONSE_MAX)


def reply_status(code: int, text: bytes) -> str:
    """The reply's own enhanced status (RFC 2034), when it is of its class."""
    match = re.match(rb"([245]\.\d{1,3}\.\d{1,3})(?![\d.])", text)
    if match and match.group(1)[0] == ord(str(code)[0]):
        return match.group(1).decode("ascii")
    return "%d.0.0" % (code // 100)


def read_secret(password: str) -> str:
    """A password option: itself, or the content of the file it names.  Raises OSError."""
    path = secret_path(password)
    if not path:
        return password
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except UnicodeDecodeError:
        raise OSError(0, "%s: not UTF-8" % path) from None


def secret_path(password: str) -> str:
    """The file that a password option names; empty when it is the password itself."""
    return password[5:] if password.startswith("file:") else ""


class Parcel:
    """A job opened: its sidecar, its body, the recipients it is for."""

    def __init__(self, job: Job, sidecar: Dict[str, Any], message: Message, wanted: List[Dict[str, Any]]) -> None:
        self.job = job
        self.sidecar = sidecar
        self.message = message
        self.wanted = wanted
        self.is_whole = len(wanted) == sum(one["state"] == QUEUED for one in sidecar["recipients"])
        self.results: List[Result] = []
        self.started = time.monotonic()


class Leg:
    """One transaction: up to 100 recipients of a parcel."""

    def __init__(self, parcel: Parcel, recipients: List[Dict[str, Any]], is_last: bool) -> None:
        self.parcel = parcel
        self.recipients = recipients
        self.is_last = is_last
        self.is_sent = False            # its end of data may have reached the peer
        self.is_cut = False             # ... and may not: the peer took no more
        self.accepted: List[Dict[str, Any]] = []


class Line(threading.Thread):
    """A connection to a primary, in a thread of its own."""

    def __init__(self, plan: Plan, post: Callable[[Any], None]) -> None:
        super().__init__(name="%s %s" % (type(self).__name__, plan.site), daemon=True)
        self.plan = plan
        self.post = post
        self.client = Client(plan.hostname)
        self.hop = Hop("none", "", 0)
        self.hops: Tuple[Hop, ...] = ()         # the loop's: the route
        self.is_over = False
        self.is_former = False                  # the loop's: the site has another primary now

    def cut(self) -> None:
        """From the loop, when time is up: what waits for the peer fails now."""
        sock = self.client.sock
        if sock is not None:
            try:
                socket.socket.shutdown(sock, socket.SHUT_RDWR)      # SSLSocket's takes TLS away first, from under the thread
            except OSError:
                pass

    def _connect(self) -> None:
        """The first host on the route that greets.  Raises PeerError."""
        self.hop = Hop("none", "", 0)
        hops, warning = find_route(self.plan)
        self.post(Routed(self, tuple(hops), warning))
        problem: Optional[PeerError] = None
        for hop, sock in connect_each(hops):
            try:
                if isinstance(sock, OSError):
                    raise PeerError("connect to %s: %s" % (hop.where, sock.strerror or sock))
                try:
                    self._greet(hop, sock, self.plan.cfg.tls)
                except TlsError:
                    if self.plan.cfg.tls != "may" or self.plan.login:
                        raise
                    again = socket.create_connection((hop.address, hop.port), CONNECT_S)
                    self._greet(hop, again, "none")         # in the clear
                self.hop = hop
                return
            except PeerError as error:
                problem = problem or error
            except (smtplib.SMTPException, OSError, ValueError) as error:
                problem = problem or PeerError("%s: %s" % (str(hop), printable(str(error))))
        self.client.close()
        assert problem is not None
        raise problem

    def _greet(self, hop: Hop, sock: socket.socket, policy: str) -> None:
        self.client.close()
        self.client = Client(self.plan.hostname)
        self.client.open(hop, sock)
        self.client.hello()
        self.client.secure("require" if self.plan.login and policy == "may" else policy)
        if self.plan.login:
            self._log_in(*self.plan.login)

    def _log_in(self, username: str, password: str) -> None:
        """AUTH at a smarthost, RFC 4954.  Whatever it answers says nothing about the mail."""
        password = read_secret(password)
        self.client.wait(COMMAND_S)
        try:
            self.client.login(username, password)
        except smtplib.SMTPResponseException as error:
            text = error.smtp_error if isinstance(error.smtp_error, bytes) else error.smtp_error.encode()
            raise PeerError("AUTH at %s failed: %s" % (self.client._host, reply_text(error.smtp_code, text))) from None
        except smtplib.SMTPException as error:
            raise PeerError("AUTH at %s failed: %s" % (self.client._host, printable(str(error), 200))) from None

    def _size_limit(self) -> int:
        """SIZE, RFC 1870; 0 when it names none."""
        value = self.client.esmtp_features.get("size", "")
        return int(value) if value.isdigit() and len(value) < 16 else 0

    def _command(self, line: bytes, seconds: float) -> Tuple[int, bytes]:
        if line:
            self._check_step()
            self.client.write(line)
        self.client.wait(seconds)
        return self.client.getreply()

    def _check_step(self) -> None:
        """All that was asked is answered: one reply more, and each would count for another command."""
        if self.client.pending:
            raise PeerError("%s says what it was not asked for: %s" % (
                self.hop, printable(self.client.pending[:100].decode("latin-1"))), self.client.pending.startswith(b"421"))

    def _quit(self) -> None:
        """Everything was answered before: what QUIT brings is of no interest."""
        self.client.wait(QUIT_S)
        try:
            self.client.docmd("QUIT")
        except (PeerError, smtplib.SMTPException, OSError):
            pass


class Courier(Line):
    """Delivers.  The loop puts jobs into `inbox`, None for "that was all";
    `jobs` are those it has not answered and belongs to the loop."""

    def __init__(self, spool: Spool, plan: Plan, post: Callable[[Any], None]) -> None:
        super().__init__(plan, post)
        self.spool = spool
        self.inbox: "queue.SimpleQueue[Optional[Job]]" = queue.SimpleQueue()
        self.jobs: Dict[str, Entry] = {}
        self.is_greeted = False         # the loop's
        self.is_leaving = False         # the loop's: None was sent
        self.taken = 0                  # messages the peer took on this connection
        self.settled = 0                # transactions it answered
        self.is_out_of_step = False     # its replies cannot be told apart: no CHUNKING the next time
        self.is_lost = False            # the peer takes no more
        self.is_in_doubt = False        # it ended with several messages in flight
        self.legs: Deque[Leg] = collections.deque()
        self.flight: Deque[Leg] = collections.deque()       # sent, not answered
        self.answered = 0.0             # monotonic, of the last answer to a message
        self.pipelining = False
        self.chunking = False
        self.unsent = b""               # of the transactions in flight, not yet written
        self.gathered: List[Leg] = []           # ... and which these are
        self.introduced: List[str] = []         # the client that the peer was told of last
        self.named = ("", "")                   # its address, and the name found for it

    def recall(self) -> List[str]:
        """From the loop: jobs that were given and are not begun yet."""
        out: List[str] = []
        with contextlib.suppress(queue.Empty):
            while True:
                job = self.inbox.get_nowait()
                out += [job.id] if job is not None else []
        return out

    def leave(self) -> None:
        """From the loop: end in good order after the messages that are under way."""
        self.is_leaving = self.is_over = True
        self.inbox.put(None)

    def run(self) -> None:
        error, closing, bug = "", False, None
        try:
            self._connect()
            self.post(Greeted(self, self.hop, self._size_limit()))
            self._serve()
        except PeerError as problem:
            error, closing = str(problem), problem.closing
        except Exception as problem:
            error, bug = "internal error: %r" % problem, problem
        self.is_in_doubt = len(self.flight) > 1 and not closing
        try:
            self._abandon(error, closing)
            self.client.close()
        except OSError:
            pass
        except Exception as problem:
            bug = bug or problem
        self.post(Finished(self, error, bug))       # whatever happens: the loop waits for it

    # -- what to send

    def _next_leg(self, wait: bool) -> Optional[Leg]:
        """The next transaction; None when there is none (now, or within the
        time a connection may idle)."""
        while not self.legs:
            if self.is_over:
                return None
            try:
                job = self.inbox.get(timeout=IDLE_CONNECTION_S) if wait else self.inbox.get_nowait()
            except queue.Empty:
                self.is_over = self.is_over or wait
                return None
            if job is None:
                self.is_over = True
                return None
            self._open(job)
        return self.legs.popleft()

    def _open(self, job: Job) -> None:
        """Read and verify a message; what cannot be sent is answered here."""
        try:
            sidecar = self.spool.read_sidecar(job.id)
            wanted = [one for one in sidecar["recipients"] if one["state"] == QUEUED and job.domain in ("", one["domain"])]
            message = self.spool.read_message(job.id, sidecar)
        except (Corrupt, OSError) as error:
            return self.post(Outcome(self, job, (), False, 0.0, "none", 0.0, error))
        parcel = Parcel(job, sidecar, message, wanted)
        limit = self._size_limit()
        if limit and sidecar["size"] > limit:
            self._fail_parcel(parcel, "5.3.4", "message of %d octets exceeds the primary's limit of %d"
                              % (sidecar["size"], limit))
        elif sidecar["smtputf8"] and "smtputf8" not in self.client.esmtp_features:
            self._fail_parcel(parcel, "5.6.7", "the primary does not offer SMTPUTF8, which this message needs")
        elif not wanted:
            message.close()
            self.post(Outcome(self, job, (), False, sidecar["received"], str(self.hop), 0.0, Settled("no recipients left")))
        else:
            for start in range(0, len(wanted), RCPTS_PER_TRANSACTION):
                group = wanted[start:start + RCPTS_PER_TRANSACTION]
                self.legs.append(Leg(parcel, group, start + len(group) == len(wanted)))

    def _fail_parcel(self, parcel: Parcel, status: str, text: str) -> None:
        parcel.results = [make_deferral(one, status, text) for one in parcel.wanted]
        self._answer(parcel)

    def _answer(self, parcel: Parcel) -> None:
        parcel.message.close()
        wants_report = "dsn" not in self.client.esmtp_features and any("SUCCESS" in one["notify"] for one in parcel.wanted)
        now = time.monotonic()
        pace_s, since, self.answered = now - max(self.answered, parcel.started), now - self.answered, now
        can_wait = since < GATHERING_S / 2 and self.inbox.qsize() > JOBS_LOW and all(one.kind == "sent" for one in parcel.results)
        self.post(Outcome(self, parcel.job, tuple(parcel.results), parcel.is_whole, parcel.sidecar["received"],
                          str(self.hop), now - parcel.started, None, wants_report, pace_s, can_wait))

    def _give(self, leg: Leg, recipients: Iterable[Dict[str, Any]], code: int, text: bytes,
              is_good: Optional[bool] = None) -> None:
        """The peer's reply holds for these recipients."""
        kind = {2: "sent", 5: "refused"}.get(code // 100, "deferred")
        if code // 100 == 3:
            text = b"unexpected reply: %d %s" % (code, text)
        status = reply_status(code, text) if code // 100 != 3 else "4.5.0"
        response = reply_text(code, text)
        is_told = "dsn" in self.client.esmtp_features
        leg.parcel.results += [Result(one["address"], kind, status, response, self.hop.host, one["refused_since"], is_good,
                                      is_content=is_good is True, is_told=is_told) for one in recipients]

    def _finish(self, leg: Leg) -> None:
        if any(result.kind == "sent" for result in leg.parcel.results):
            self.taken += 1
        if leg.is_last:
            self._answer(leg.parcel)

    def _abandon(self, error: str, closing: bool = False) -> None:
        """The connection is over.  What was under way, or was sent in part, is
        deferred; what had not begun, or met a peer that has had enough for now, goes back untried.
        `closing`: it said 421, and has read nothing behind that."""
        legs = [*self.flight, *self.legs]
        blamed = self.flight[0].parcel if self.flight and not (closing and self.taken) else None    # the first in line
        self.flight.clear()
        self.legs.clear()
        for parcel in dict.fromkeys(leg.parcel for leg in legs):
            its = [leg for leg in legs if leg.parcel is parcel]
            answered = {result.address for result in parcel.results}
            if answered or parcel is blamed or (not closing and any(leg.is_sent for leg in its)):
                taken = {one["address"] for leg in its for one in leg.accepted}     # RCPT's answer stands
                parcel.results += [make_deferral(one, "4.4.2", error)._replace(is_good=one["address"] in taken or None)
                                   for one in parcel.wanted if one["address"] not in answered]
            self._answer(parcel)        # without results: given back

    # -- sending

    def _serve(self) -> None:
        """Keep as many transactions in flight as the peer's extensions allow, and read their answers in order."""
        self._note_features()
        while True:
            while not self.is_lost and self._has_room():
                leg = self._next_leg(wait=not self.flight)
                if leg is None:
                    break
                if not self.flight and not self.client.is_silent():
                    self.legs.appendleft(leg)
                    return self._part()
                self._launch(leg)
            if not self.flight:
                return self._part() if self.is_lost else self._quit()
            ended = self._land()
            if ended is not None:       # behind a verdict, with nothing else under way: that is nobody's fault
                self._abandon(str(ended), True)
                return self._quit()

    def _has_room(self) -> bool:
        """DATA must be the last command of a group (RFC 2920 3.1), so there one
        transaction is in flight, and at most the next one's envelope.  BDAT may
        be followed by anything (RFC 3030 2): then a window of whole messages
        is, once the peer has taken the first; a small one that grows, where the last connection
        broke and left several in doubt.  Not behind XCLIENT, which comes between messages."""
        if not (self.chunking and self.pipelining) or not self.taken or self.plan.cfg.xclient:
            return not self.flight
        window = min(CHUNK_MESSAGES, 1 + self.taken // 4) if self.plan.is_wary else CHUNK_MESSAGES
        return (len(self.flight) < window
                and sum(leg.parcel.sidecar["size"] for leg in self.flight) < CHUNK_OCTETS
                and sum(len(leg.recipients) for leg in self.flight) < CHUNK_RECIPIENTS)

    def _note_features(self) -> None:
        features = self.client.esmtp_features
        self.pipelining = "pipelining" in features
        self.chunking = "chunking" in features and self.plan.chunking

    def _part(self) -> None:
        """The peer ended the connection while we were idle.  That is nobody's
        fault after a transaction; before the first it is a way to say no."""
        words = printable(self.client.pending[:200].decode("latin-1").strip())
        error = "%s ended the connection%s" % (self.hop, ": " + words if words else "")
        if not self.settled:
            raise PeerError(error, True)
        self._abandon(error, True)
        self._quit()

    def _envelope(self, leg: Leg) -> List[bytes]:
        """MAIL and RCPT commands.  Addresses went through our grammar twice."""
        sidecar, features = leg.parcel.sidecar, self.client.esmtp_features
        mail = "MAIL FROM:<%s>" % sidecar["sender"]
        if "size" in features:
            mail += " SIZE=%d" % sidecar["size"]
        if sidecar["body"] == "8BITMIME" and "8bitmime" in features:
            mail += " BODY=8BITMIME"
        if sidecar["smtputf8"]:
            mail += " SMTPUTF8"
        dsn = "dsn" in features
        if dsn:
            mail += " RET=" + sidecar["ret"] if sidecar["ret"] else ""
            mail += " ENVID=" + sidecar["envid"] if sidecar["envid"] else ""
        out = [mail]
        for one in leg.recipients:
            rcpt = "RCPT TO:<%s>" % one["address"]
            if dsn:
                rcpt += " NOTIFY=" + one["notify"] if one["notify"] else ""
                rcpt += " ORCPT=" + one["orcpt"] if one["orcpt"] else ""
            out.append(rcpt)
        return [line.encode("utf-8") + b"\r\n" for line in out]

    def _introduce(self, leg: Leg) -> None:
        """XCLIENT, else XFORWARD: who the original client was, for the primary's
        checks.  A primary that does not trust us with it is no reason to wait."""
        if not self.plan.cfg.xclient:
            return
        for verb in ("xclient", "xforward"):
            offered = self.client.esmtp_features.get(verb, "").upper().split()
            if not offered:
                continue
            known = self._origin(leg)
            words = ["%s=%s" % (name, known[name]) for name in offered if name in known]
            if not words or (verb == "xclient" and words == self.introduced):
                return                  # XCLIENT holds until another; XFORWARD for one transaction
            self.introduced = words
            code, text = self._command(("%s %s\r\n" % (verb.upper(), " ".join(words))).encode("ascii"), COMMAND_S)
            self._leave_if_told(code, text)
            if verb == "xclient" and code == 220:
                helo = decode_xtext(known["HELO"])      # the session begins anew
                self.client.hello(helo if re.fullmatch(r"[!-~]+", helo) and helo[0] != "[" else "[%s]" % known["ADDR"])
                self._note_features()                   # they may be others for that client
            return

    def _origin(self, leg: Leg) -> Dict[str, str]:
        """Attributes as xtext.  Mail of our own comes from ourselves, also where somebody else was introduced before."""
        sidecar = leg.parcel.sidecar
        address, helo = sidecar["client"]["address"], sidecar["client"]["helo"]
        if not address:
            assert self.client.sock is not None
            address, helo, name = self.client.sock.getsockname()[0], self.plan.hostname, self.plan.hostname
        elif self.named[0] == address:
            name = self.named[1]
        else:
            name = self._name_of(address)
            self.named = (address, name)
        address = address.partition("%")[0]
        return {"NAME": name, "ADDR": "IPV6:" + address if ":" in address else address, "PORT": "[UNAVAILABLE]",
                "HELO": encode_xtext(helo, XCLIENT_VALUE_MAX) or "[UNAVAILABLE]", "PROTO": "ESMTP",
                "IDENT": sidecar["id"], "SOURCE": "REMOTE"}

    def _name_of(self, address: str) -> str:
        try:
            return self.plan.resolver.name_of(address) or "[UNAVAILABLE]"
        except DnsError:
            return "[TEMPUNAVAIL]"

    def _launch(self, leg: Leg) -> None:
        """Send as much of a transaction as need not wait for an answer."""
        self.flight.append(leg)         # first: a peer that breaks off at the introduction has had this message
        if len(self.flight) == 1:
            self._introduce(leg)
        if self.pipelining and self.chunking:
            self._send_chunk(leg)
        elif self.pipelining:
            self.client.write(b"".join(self._envelope(leg)) + b"DATA\r\n")

    def _land(self) -> Optional[PeerError]:
        """Read the answers to the first transaction in flight.  Returns how the
        connection ended, where it did so in good order behind them."""
        leg = self.flight[0]
        self._flush()
        code, text = self._read_envelope(leg)
        if self.chunking and leg.is_sent:
            ended = self._look_behind()
            self._settle(leg, code, text)
            if ended is not None and self.flight:
                raise ended
            return ended
        if leg.accepted and code == 354:
            self._check_step()
            self._send_body(leg)
            self.client.wait(END_OF_DATA_S)
            self._settle(leg, *self.client.getreply())
            return None
        if leg.accepted and code // 100 == 2:       # nothing was sent yet, so nothing can have been taken
            code, text = 451, b"4.5.0 unexpected reply to DATA: %d %s" % (code, text)
        elif code == 354:
            self.client.write(b".\r\n")     # RFC 2920 3.1: nobody is to get it, but the data must end
            self._command(b"", END_OF_DATA_S)
        self._settle(leg, code, text)
        self._leave_if_told(*self._command(b"RSET\r\n", COMMAND_S))
        return None

    def _look_behind(self) -> Optional[PeerError]:
        """With CHUNKING, one reply too many would make each message's verdict out
        of a RCPT's 250.  So RSET follows each message, and a verdict counts when that was answered
        behind it.  Returns how the connection ended, if it did: that speaks against no verdict, but where the peer may
        not even have had all of the message."""
        if not self.pipelining and not self.client.pending.startswith(b"421"):      # that may come at any time
            self._check_step()
        try:
            code, text = self._command(b"" if self.pipelining else b"RSET\r\n", COMMAND_S)
            self._leave_if_told(code, text)
        except PeerError as error:
            if self.flight[0].is_cut:
                raise
            return error
        if code == 250:
            return None
        oddity = PeerError("%s answers RSET with %s" % (self.hop, reply_text(code, text)))
        if not self.pipelining:
            return oddity               # each command had its reply before the next: the peer is odd, but in step
        self.is_out_of_step = True
        raise oddity

    def _settle(self, leg: Leg, code: int, text: bytes) -> None:
        """The last answer of a transaction: it holds for the recipients that were accepted."""
        self._give(leg, leg.accepted, code, text, True)
        self._end_leg(leg)
        self._leave_if_told(code, text)

    def _end_leg(self, leg: Leg) -> None:
        self.flight.popleft()
        self.settled += 1
        self._finish(leg)

    def _leave_if_told(self, code: int, text: bytes) -> None:
        if code == 421:
            raise PeerError("%s: %s" % (self.hop, reply_text(code, text)), True)

    def _read_envelope(self, leg: Leg) -> Tuple[int, bytes]:
        """Replies to MAIL and RCPT; returns that to DATA or BDAT.  Without
        PIPELINING each command waits for the one before."""
        envelope = self._envelope(leg)

        def step(line: bytes, seconds: float) -> Tuple[int, bytes]:
            code, text = self._command(b"" if self.pipelining else line, seconds)
            self._leave_if_told(code, text)
            return code, text

        code, text = step(envelope[0], COMMAND_S)
        refused = code // 100 != 2
        if refused:
            self._give(leg, leg.recipients, code, text)
            if not self.pipelining:
                return 503, b""
        for one, line in zip(leg.recipients, envelope[1:]):
            code, text = step(line, COMMAND_S)
            if refused:
                continue
            if code // 100 == 2:
                leg.accepted.append(one)
            else:
                if code == 552 and reply_status(code, text) in ("5.0.0", "5.5.3"):       # RFC 5321 4.5.3.1.10
                    code, text = 452, b"4.5.3 too many recipients: 552 " + text
                self._give(leg, [one], code, text, False if is_no_such_user(code, text) else None)
        if not leg.accepted and not self.pipelining:
            return 503, b""
        if self.chunking and not self.pipelining:
            self._check_step()
            self._send_chunk(leg)
            self._flush()
        return self._command(b"" if self.pipelining or self.chunking else b"DATA\r\n",
                             END_OF_DATA_S if self.chunking else DATA_S)

    def _send_chunk(self, leg: Leg) -> None:
        """A whole transaction; small ones are gathered and leave together.
        Whatever the peer thinks of the envelope it reads the octets announced as
        data (RFC 3030 2).  RSET ends it, should it have failed half-way."""
        self.gathered.append(leg)
        self.unsent += b"".join(self._envelope(leg)) if self.pipelining else b""
        self.unsent += b"BDAT %d LAST\r\n" % leg.parcel.message.size
        for block in leg.parcel.message.blocks():
            if len(self.unsent) >= BLOCK_OCTETS:
                self._flush(leg)
            self.unsent += block
        self.unsent += b"RSET\r\n" if self.pipelining else b""

    def _flush(self, *unfinished: Leg) -> None:
        """What was gathered leaves.  When the peer takes no more, its answers to what came before are read first."""
        ready, self.unsent = self.unsent, b""
        legs, self.gathered = self.gathered, list(unfinished)
        for leg in legs:
            leg.is_sent = True
        try:
            if ready and not self.is_lost:
                self.client.write(ready)
        except LostError:
            self.is_lost = True
            for leg in legs:
                leg.is_cut = True

    def _send_body(self, leg: Leg) -> None:
        """The message, dot-stuffed (RFC 5321 4.5.2), block by block; with
        PIPELINING the next envelope goes right behind its end (RFC 2920 3.1)."""
        leg.is_sent = True
        held = b"\r\n"                  # what came just before: a dot after it is stuffed
        ready = b""
        for block in leg.parcel.message.blocks():
            if ready:
                self.client.write(ready)
            stuffed = (held + block).replace(b"\r\n.", b"\r\n..")[len(held):]
            held = block[-2:] if len(block) > 1 else (held + block)[-2:]
            ready = stuffed
        may_follow = self.pipelining and not self.plan.cfg.xclient      # a client is introduced between messages
        follower = self._next_leg(wait=False) if may_follow else None
        ready += b".\r\n"
        if follower is not None:
            ready += b"".join(self._envelope(follower)) + b"DATA\r\n"
            self.flight.append(follower)
        self.client.write(ready)


class Turnaround(Courier):
    """ATRN: the client turned into a server, and we deliver over the
    connection that it made (RFC 2645 5.2.1).  Its sites are served one after
    the other; `left` are those whose turn has not come."""

    def __init__(self, spool: Spool, plan: Plan, post: Callable[[Any], None], hop: Hop, sock: socket.socket,
                 unsaid: bytes, early: bytes) -> None:
        """`unsaid`: replies that have not gone out yet, our 250 the last of
        them; `early`: what the client sent behind its command."""
        super().__init__(spool, plan, post)
        self.customer = hop
        self.unsaid = unsaid
        self.sites: Tuple[Site, ...] = ()               # the loop's, as the next two
        self.left: Deque[Site] = collections.deque()
        self.on_over: Callable[[], None] = lambda: None
        self.client.sock = sock         # from now on cut() finds it
        self.client.pending = early

    def _connect(self) -> None:
        """No STARTTLS: what the tls option asks was seen to before, and a client
        that only passes lines on, like fetchmail, could not take part in it."""
        sock = self.client.sock
        assert sock is not None
        self.client._host = self.customer.host
        try:
            self.client.write(self.unsaid, COMMAND_S)
            self.client.open(self.customer, sock, COMMAND_S)    # it may have to start its server first
            self.client.hello()
        except (smtplib.SMTPException, OSError) as error:
            raise PeerError("%s: %s" % (str(self.customer), printable(str(error)))) from None
        self.hop = self.customer


def make_deferral(one: Mapping[str, Any], status: str, response: str) -> Result:
    """Put off for a reason of our own."""
    return Result(one["address"], "deferred", status, response, "", one["refused_since"])


def is_no_such_user(code: int, text: bytes) -> bool:
    """Whether a refusal of RCPT is about the recipient; others are about us, or the day."""
    return code in (550, 551, 553) or (code // 100 == 5 and reply_status(code, text).startswith("5.1."))


class Answered(NamedTuple):
    inquirer: "Inquirer"
    address: str
    word: str                   # good, bad, or silent
    text: str                   # the reply, for the client


class Heard(NamedTuple):
    inquirer: "Inquirer"
    hop: Hop
    size_limit: int


class Unheard(NamedTuple):
    inquirer: "Inquirer"
    error: str                  # empty when it ended in good order
    bug: Optional[BaseException] = None


class Inquirer(Line):
    """Call-ahead: asks the primary whether it takes a recipient, and sends
    nothing.  The loop puts addresses into `inbox`, an empty one to learn only
    whether it is there; `open` are those not answered and belongs to the loop."""

    def __init__(self, plan: Plan, post: Callable[[Any], None]) -> None:
        super().__init__(plan, post)
        self.inbox: "queue.SimpleQueue[str]" = queue.SimpleQueue()
        self.open: Set[str] = set()
        self.stranger = ""              # a local part that cannot exist: whether the primary takes any

    def run(self) -> None:
        error, bug = "", None
        try:
            self._connect()
            self.post(Heard(self, self.hop, self._size_limit()))
            self._answer_all()
            self._quit()
        except PeerError as problem:
            error = str(problem)
        except Exception as problem:
            error, bug = "internal error: %r" % problem, problem
        try:
            self.client.close()
        except OSError:
            pass
        self.post(Unheard(self, error, bug))

    def _answer_all(self) -> None:
        while True:
            try:
                address = self.inbox.get(timeout=INQUIRER_IDLE_S)
            except queue.Empty:
                return
            if not self.client.is_silent():     # it closed while nobody asked
                self._connect()
            word, text = self._ask(address) if address else ("silent", "")
            self.post(Answered(self, address, word, text))

    def _ask(self, address: str) -> Tuple[str, str]:
        """Only a real verdict counts: RCPT's own, after an accepted MAIL."""
        lines = [b"MAIL FROM:<>", b"RCPT TO:<" + address.encode("utf-8") + b">", b"RSET"]
        if not address.isascii():
            if "smtputf8" not in self.client.esmtp_features:
                return "silent", ""
            lines[0] += b" SMTPUTF8"
        replies = []
        if "pipelining" in self.client.esmtp_features:
            self.client.write(b"\r\n".join(lines) + b"\r\n")
            lines = [b""] * 3
        for line in lines:
            replies.append(self._command(line and line + b"\r\n", CALL_AHEAD_S))
            if replies[-1][0] == 421:
                raise PeerError("%s: %s" % (str(self.hop), reply_text(*replies[-1])), True)
        (mail, _), (code, text), _ = replies
        if mail // 100 == 2 and code // 100 == 2:
            return "good", ""
        if mail // 100 == 2 and is_no_such_user(code, text):
            return "bad", reply_text(code, text)
        return "silent", reply_text(code, text)



# == 12. QUEUE =================================================================
# What becomes of queued mail: loading, connections, outcomes, notices, expiry.
# Runs in the loop thread and never waits: disk work goes to the committers,
# the network to couriers, and their reports come back through handle().

class Ids:
    """Queue IDs: the time in microseconds, never the same twice, in upper-case
    hex, so that a spool sorts by age.  Notices take theirs in committer threads."""

    def __init__(self) -> None:
        self.last = 0
        self.lock = threading.Lock()
        # Being made durable, or durable and not admitted yet: the loop hears of it from whoever made it.
        self.coming: Set[str] = set()

    def new(self) -> str:
        with self.lock:
            self.last = max(self.last + 1, time.time_ns() // 1000)
            return "%X" % self.last


class Verdict(NamedTuple):
    """What is to be written of one recipient."""
    address: str
    state: str                  # QUEUED when it was deferred
    status: str
    response: str
    remote: str
    refused_since: Optional[Time] = None
    is_told: bool = True        # False: the next host will not report success, so we do where it was asked


class Record(NamedTuple):
    """A change to a sidecar, made in a committer thread."""
    judge: Callable[[Mapping[str, Any]], Optional[Verdict]]     # for each queued recipient; None leaves it alone
    attempts: int               # to add to those judged
    last_attempt: Optional[Time]        # None when there was none since the last record
    next_attempt: Time


class Recorded(NamedTuple):
    sidecar: Dict[str, Any]
    verdicts: Tuple[Verdict, ...]
    notices: Tuple[Dict[str, Any], ...]     # sidecars of notices now in the spool
    remarks: Tuple[str, ...]                # for the log
    is_finished: bool                       # no recipient is left: the pair may go


def format_primary(primary: Union[str, Tuple[Endpoint, ...]]) -> str:
    return primary if isinstance(primary, str) else ", ".join(map(str, primary))


def parse_known_route(known: Any, primary: Union[str, Tuple[Endpoint, ...]]) -> List[Hop]:
    """The route of a site in state.json; none when it led to another `primary`: mail never goes where it went once."""
    try:
        if known["route_of"] != format_primary(primary):
            return []
        return [Hop(str(host), str(ipaddress.ip_address(address)), int(port)) for host, address, port in known["route"]]
    except (TypeError, ValueError, KeyError):
        return []                       # written by hand, or by another version: only knowledge is lost


class Queued(NamedTuple):
    """What the loop needs of a sidecar."""
    id: str
    kind: str
    size: int
    received: Time
    domains: Dict[str, Tuple[int, Time, bool]]      # domain: (attempts, next attempt, held)


class Loaded(NamedTuple):
    found: Tuple[Queued, ...]
    remarks: Tuple[str, ...] = ()
    is_last: bool = False
    error: str = ""             # why the directory could not be read
    unread: str = ""            # a message that the disk would not give, and why
    is_unsettled: bool = False  # pairs seem to be on their way in


def is_part(recipient: Mapping[str, Any], domain: str) -> bool:
    """Whether a recipient belongs to a site's part of a message; an empty domain means all."""
    return not domain or bool(recipient["domain"] == domain)


def summarize(sidecar: Mapping[str, Any]) -> Queued:
    domains: Dict[str, Tuple[int, Time, bool]] = {}
    for one in sidecar["recipients"]:
        if one["state"] == QUEUED:
            attempts, due, _ = domains.get(one["domain"], (0, one["next_attempt"], False))
            domains[one["domain"]] = (max(attempts, one["attempts"]), min(due, one["next_attempt"]),
                                      sidecar["kind"] != "mail" and bool(sidecar["held"]) or one["domain"] in sidecar["held"])
    return Queued(sidecar["id"], sidecar["kind"], sidecar["size"], sidecar["received"], domains)


Told = Dict[str, Tuple[List[Dict[str, Any]], List[str]]]        # action: what send_notice() made of it


def write_record(spool: Spool, id: str, record: Record, cfg: Config, ids: Ids, told: Optional[Told] = None) -> Recorded:
    """In a committer thread.  A notice is on stable storage before its
    recipients are marked: a crash between makes a second notice, never none.
    `told` outlives a failure to mark them, so that trying again sends none."""
    now = time.time()
    told = {} if told is None else told
    sidecar = spool.read_sidecar(id)
    touched = []
    for one in sidecar["recipients"]:
        verdict = record.judge(one) if one["state"] == QUEUED else None
        if verdict is None:
            continue
        touched.append((one, verdict))
        one["attempts"] += record.attempts
        if record.last_attempt is not None:
            one["last_attempt"], one["next_attempt"] = record.last_attempt, record.next_attempt
        one["last_status"], one["last_response"], one["last_remote"] = verdict.status, verdict.response, verdict.remote
        one["refused_since"] = verdict.refused_since
    failed = [one for one, verdict in touched if verdict.state in (BOUNCED, EXPIRED)]
    relayed = [one for one, verdict in touched if verdict.state == DELIVERED and not verdict.is_told]
    for action, recipients in (("failed", failed), ("relayed", relayed)):
        if action not in told:
            told[action] = send_notice(spool, sidecar, action, recipients, cfg, ids, now)
    for one, verdict in touched:
        one["state"] = verdict.state
    is_finished = all(one["state"] != QUEUED for one in sidecar["recipients"])
    if touched and not is_finished:
        spool.replace_sidecar(id, sidecar)
    return Recorded(sidecar, tuple(verdict for _, verdict in touched), *_all_told(told), is_finished)


def _all_told(told: Told) -> Tuple[Tuple[Dict[str, Any], ...], Tuple[str, ...]]:
    """Notices and remarks."""
    return (tuple(notice for notices, _ in told.values() for notice in notices),
            tuple(remark for _, remarks in told.values() for remark in remarks))


def write_delay(spool: Spool, id: str, attempts: int, last: Optional[Time], error: str, cfg: Config, ids: Ids,
                sent: Told) -> Recorded:
    """In a committer thread: tell the sender, once, that a message waits.
    `attempts`, `last` and `error`: of the connections that failed since the last answer, which no sidecar knows."""
    now = time.time()
    sidecar = spool.read_sidecar(id)
    fresh = [one for one in sidecar["recipients"] if one["state"] == QUEUED and not one.get("delayed")]
    told = [one if not error or (one["last_response"] and not attempts) else
            dict(one, attempts=one["attempts"] + attempts, last_attempt=last or one["last_attempt"], last_response=error,
                 last_status="4.4.1", last_remote="") for one in fresh]
    if "delayed" not in sent:
        sent["delayed"] = send_notice(spool, sidecar, "delayed", told, cfg, ids, now)
    for one in fresh:
        one["delayed"] = True
    if fresh:
        spool.replace_sidecar(id, sidecar)
    return Recorded(sidecar, (), *_all_told(sent), False)


NOTIFY_WORDS = {"failed": "FAILURE", "delayed": "DELAY", "relayed": "SUCCESS"}
NOTICE_NAMES = {"failed": "non-delivery notification", "delayed": "delay notification",
                "relayed": "delivery status notification"}


def wants_notice(notify: str, action: str) -> bool:
    """RFC 3461 4.1; without NOTIFY, failures are told, and delays where the operator says so."""
    return NOTIFY_WORDS[action] in notify if notify else action != "relayed"


def notice_status(action: str, status: str) -> str:
    """RFC 3464 2.3.4: what is delayed has not failed, also where a 5xx was kept."""
    return "2.0.0" if action == "relayed" else "4" + status[1:] if action == "delayed" else status


def send_notice(spool: Spool, sidecar: Dict[str, Any], action: str, recipients: Sequence[Dict[str, Any]], cfg: Config,
                ids: Ids, now: Time) -> Tuple[List[Dict[str, Any]], List[str]]:
    """Put a notice about these recipients into the spool; raises OSError.
    Returns its sidecar, if one was made, and lines for the log.  A failure that
    cannot be told to a sender is told to [bounces] postmaster, once."""
    told = [one for one in recipients if wants_notice(one["notify"], action)]
    target = sidecar["sender"] if "@" in sidecar["sender"] else ""      # <postmaster> alone is nobody elsewhere
    if told and not target and action == "failed":
        target = "" if sidecar["kind"] == "alert" else cfg.bounces_postmaster
        if not target or any(one["address"] == target for one in told):
            return [], ["%s: double bounce: dropped, nobody to tell" % sidecar["id"]]
    if not told or not target:
        return [], []
    reports = [Report(one["address"], action, notice_status(action, one["last_status"]), one["last_response"],
                      one["last_remote"], one["orcpt"], one["attempts"], one["last_attempt"]) for one in told]
    full = action == "failed" and sidecar["ret"] == "FULL" and sidecar["size"] <= NOTICE_FULL_MAX
    original = b""
    try:
        if full:
            message = spool.read_message(sidecar["id"], sidecar)
            original = b"".join(message.blocks())
            message.close()
        else:
            original = spool.read_header(sidecar["id"])
    except Corrupt:
        full = False
    id = ids.new()
    data = format_notice(cfg.hostname, target, sidecar, reports, original, full, now, secrets.token_hex(12), id)
    ids.coming.add(id)
    notice = commit_own(spool, id, "notice", target, data, cfg, now)
    who = "sender" if sidecar["sender"] else "postmaster"
    return [notice], ["%s: %s %s: %s" % (sidecar["id"], who, NOTICE_NAMES[action], id)]


def commit_own(spool: Spool, id: str, kind: str, target: str, data: bytes, cfg: Config, now: Time) -> Dict[str, Any]:
    """Mail of our own, from the null reverse-path; raises OSError.  Returns its sidecar."""
    path = parse_path("<%s>" % target, "5.1.3")[0]
    body = "8BITMIME" if any(byte > 127 for byte in data) else ""
    sidecar = make_sidecar(id, kind, "", [(target, path.domain, "", "", now + cfg.defaults.lifetime)], now,
                           {"address": "", "helo": "", "tls": None}, body, not target.isascii())
    error = spool.commit([(Draft(id), [data], sidecar)])[0]
    if error is not None:
        raise error
    return sidecar


def known_homes(state: Mapping[str, Any], cfg: Config) -> Dict[str, str]:
    """Of state.json: where the primaries of sections with `primary = etrn` were last."""
    homes = state.get("homes")
    return {name: address for name, address in (homes if isinstance(homes, dict) else {}).items()
            if name in cfg.domains and cfg.domains[name].primary == "etrn" and is_address(address)}


class Alerts:
    """Tells people: a program, a web hook, a mail.  Threads of their own wait for
    the first two, so that one that hangs keeps the other from nothing."""

    def __init__(self, cfg: Config, log: Log, mail: Callable[[Dict[str, Any]], None]) -> None:
        self.cfg = cfg
        self.log = log
        self.mail = mail
        self.down: Dict[str, Tuple[float, str]] = {}    # site: (monotonic when to tell, why)
        self.told: Set[str] = set()                     # sites whose trouble was told
        self.daily: Dict[str, Time] = {}                # what is told once a day, and when it was
        self.inboxes: Dict[Tell, "queue.SimpleQueue[Tuple[Config, Dict[str, Any]]]"] = {}

    def on_state(self, site: Site, event: str, text: str, now: Now) -> None:
        """A short outage is not worth an alert, nor then its end."""
        self.down.pop(site.name, None)
        if event == "down":
            self.down[site.name] = (now.mono + self.cfg.alerts_after, text)
        elif event == "rejecting":
            self.tell("rejecting", site, text, now)
        elif site.name in self.told:
            self.tell("up", site, text, now)
            self.told.discard(site.name)

    def on_known(self, site: Site, is_told: bool, now: Now) -> None:
        """An outage that began before our own restart."""
        if is_told:
            self.told.add(site.name)
        else:
            left = self.cfg.alerts_after - max(0.0, now.wall - site.since)
            self.down[site.name] = (now.mono + max(0.0, left), "down: %s" % site.last_error)

    def sweep(self, sites: Iterable[Site], free: int, now: Now, certificate_end: Time = INF) -> None:
        """Once a second: outages that have lasted, mail that nears its end, a disk that fills, a
        certificate that nobody renews."""
        known = {site.name: site for site in sites}
        for name, (at, text) in list(self.down.items()):
            if at <= now.mono:          # gone also where its site is: the loop wakes for what is left here
                del self.down[name]
                if name in known:
                    self.tell("down", known[name], text, now)
        for site in known.values():
            end = site.next_expiry()
            if end is not None and end - now.wall < min(ALERT_EXPIRY_S, site.cfg.lifetime / 2) and not site.cfg.is_notices:
                self.once_a_day("expiring", site, "mail will be returned to its senders in %s, %d messages waiting" % (
                    format_duration(end - now.wall), len(site.entries)), now)
        if free < 2 * self.cfg.min_free_space:
            self.once_a_day("disk", None, "%s left for the spool; below %s mail is refused" % (
                format_size(free), format_size(self.cfg.min_free_space)), now)
        if certificate_end - now.wall < CERTIFICATE_WARNING_S:
            self.once_a_day("certificate", None, "the certificate %s %s" % (
                self.cfg.tls_certificate, "expires in %s" % format_duration(certificate_end - now.wall)
                if certificate_end > now.wall else "has expired"), now)

    def once_a_day(self, event: str, site: Optional[Site], text: str, now: Now) -> None:
        key = "%s %s" % (event, site.name if site else "")
        if now.wall - self.daily.get(key, 0.0) >= 86400.0:
            self.daily[key] = now.wall
            about = site.label + ": " if site else ""
            self.log.write("primary" if site else "master", about + printable(text), "warning")
            self.tell(event, site, text, now)

    def tell(self, event: str, site: Optional[Site], text: str, now: Now) -> None:
        if event in ("down", "rejecting") and site:
            self.told.add(site.name)
        alert = {"event": event, "domain": site.name if site else "", "text": printable(text), "host": self.cfg.hostname,
                 "time": now.wall, "waiting": len(site.entries) if site else 0}
        if self.cfg.alerts_mail:
            self.mail(alert)
        if self.cfg.alerts_command:
            self._hand_to(run_alert_command, alert)
        if self.cfg.alerts_webhook:
            self._hand_to(post_alert, alert)

    def _hand_to(self, tell: "Tell", alert: Dict[str, Any]) -> None:
        if tell not in self.inboxes:
            inbox = self.inboxes[tell] = queue.SimpleQueue()
            threading.Thread(target=self._work, args=(tell, inbox), name="alerts", daemon=True).start()
        self.inboxes[tell].put((self.cfg, alert))

    def _work(self, tell: "Tell", inbox: "queue.SimpleQueue[Tuple[Config, Dict[str, Any]]]") -> None:
        while True:
            cfg, alert = inbox.get()
            try:
                tell(cfg, alert)
            except subprocess.CalledProcessError as error:      # without the command, which may hold a secret
                self.on_failure("command: exit status %d" % error.returncode)
            except subprocess.TimeoutExpired:
                self.on_failure("command: no end within %d s" % ALERT_S)
            except Exception as error:          # whatever is wrong with it, the mail goes on
                self.on_failure("%s: %s" % ("webhook" if tell is post_alert else "command", printable(str(error))))

    def on_failure(self, text: str) -> None:
        """Set by the manager: hands the text to the loop, for the log."""


Tell = Callable[[Config, Mapping[str, Any]], None]


def run_alert_command(cfg: Config, alert: Mapping[str, Any]) -> None:
    """[alerts] command: its words, no shell; the alert as ETRN_* variables and as JSON on standard input."""
    if cfg.alerts_command:
        names = {"ETRN_" + key.upper(): str(value) for key, value in alert.items()}
        subprocess.run(shlex.split(cfg.alerts_command), input=json.dumps(alert).encode("ascii"), timeout=ALERT_S, check=True,
                       env={**os.environ, **names}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def post_alert(cfg: Config, alert: Mapping[str, Any]) -> None:
    """[alerts] webhook: the alert as the JSON body of a POST."""
    if cfg.alerts_webhook:
        request = urllib.request.Request(cfg.alerts_webhook, json.dumps(alert).encode("ascii"),
                                         {"Content-Type": "application/json"}, method="POST")
        with urllib.request.urlopen(request, timeout=ALERT_S) as answer:
            answer.read(4096)


def format_alert(cfg: Config, alert: Mapping[str, Any], id: str) -> bytes:
    about = " ".join(filter(None, (alert["domain"], alert["text"])))
    lines = ["From: etrn_relay <MAILER-DAEMON@%s>" % cfg.hostname, "To: <%s>" % cfg.alerts_mail,
             "Subject: [etrn_relay %s] %s %s" % (cfg.hostname, alert["domain"] or "relay", alert["event"]),
             "Date: %s" % email.utils.formatdate(alert["time"], localtime=True), "Message-ID: <%s@%s>" % (id, cfg.hostname),
             "Auto-Submitted: auto-generated", "MIME-Version: 1.0", "Content-Type: text/plain; charset=us-ascii", ""]
    return ("\r\n".join(lines + _wrap(about, 72)) + "\r\n").encode("ascii", "backslashreplace")


def release_memory() -> None:
    """glibc keeps what compiling this file or a full queue took; a small machine
    has better use for it.  Other C libraries give it back by themselves."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass                            # no ctypes, or no such function


class Watch:
    """A command that waits: done when each of its messages has left or failed once."""

    def __init__(self, left: Iterable[Tuple[str, str]], needs_primary: bool) -> None:
        """`left`: (site, queue ID)."""
        self.left = set(left)
        self.needs_primary = needs_primary
        self.total = len(self.left)
        self.counts = {"delivered": 0, "bounced": 0, "expired": 0, "deferred": 0, "deleted": 0}
        self.error = ""                 # why a primary could not be reached

    def settle(self, name: str, id: str, kind: str, error: str = "") -> None:
        if (name, id) in self.left:
            self.left.discard((name, id))
            self.counts[kind] += 1
            self.error = error or self.error


class CutThrough:
    """A message whose client waits for the primary's own verdict.  While all
    is refused, what is to be done about it is put off: if it stays so, the client is
    told and nothing else happens."""

    def __init__(self, sites: Iterable[str], answer: Callable[[Optional[Reply]], None]) -> None:
        self.left = set(sites)          # not heard of yet
        self.answer = answer
        self.refusal: Optional[Reply] = None
        self.put_off: List[Callable[[], None]] = []


class Manager:
    """The queue's life.  `post` hands a report from any thread to the loop,
    which passes it to handle()."""

    def __init__(self, cfg: Config, spool: Spool, log: Log, post: Callable[[Any], None], now: Now) -> None:
        self.cfg = cfg
        self.spool = spool
        self.log = log
        self.post = post
        self.now = now
        self.ids = Ids()
        self.scheduler = Scheduler(cfg)
        self.committers = Committers(spool, post, lambda _: log.write(
            "master", "a process of ours that writes the spool has ended; the relay writes itself", "warning"))
        self.listeners: Tuple[Endpoint, ...] = ()
        self.couriers: Dict[Courier, Site] = {}
        self.inquirers: Dict[Inquirer, Site] = {}
        self.memory = Memory()
        self.questions: Dict[Tuple[str, str], List[Callable[[str, str], None]]] = {}    # (site, address): who waits
        self.waiting: Dict[str, CutThrough] = {}    # messages whose clients wait for the primary's verdict
        self.chains: Dict[str, Deque[Tuple[Work, Done]]] = {}       # per message: work that waits for earlier work
        self.unrecorded: Set[str] = set()       # messages whose outcome the disk refused, and will be asked to take again
        self.callers: Dict[str, Set[str]] = {}                      # address: sites it is a host of, as last routed
        self.fresh: Dict[str, Dict[str, Tuple[str, ...]]] = {}      # per site: messages not yet logged as deferred, recipients
        self.watches: List[Watch] = []
        self.retries: List[Tuple[float, int, Callable[[], None]]] = []     # heap of (monotonic, tie, what)
        self.is_loading = False
        self.must_reload = False        # asked for while it was read
        self.has_misplaced = False      # mail of our own is where it no longer belongs
        self.loads = 0
        self.load_pause = RETRY_DISK_S  # before another attempt at what could not be read
        self.gone: Set[str] = set()     # removed while the spool was being read
        self.early: Set[str] = set()    # flushes asked for while it was
        self.load_error = ""
        self.free = spool.free()        # octets, as last asked
        self.next_free = now.mono
        self.certificate_end: Time = INF    # set by the server, which has it
        self.last_outcome = -INF        # monotonic
        self.is_stopping = False
        self.is_offline = False         # a --flush without a daemon
        self.is_dirty = False           # something worth saving changed
        self.alerts = Alerts(cfg, log, self._mail_alert)
        self.alerts.on_failure = lambda text: post([(self._log_alert, text)])       # type: ignore[method-assign]
        self.saves = 0                  # of the state, so far
        self.saving = 0                 # ... that the disk has yet to take
        self.next_save = now.mono + STATE_SAVE_S
        self.next_sweep = now.mono
        self.began = now.mono
        self.drift = now.wall - now.mono
        self.on_size_limit: Callable[[], None] = lambda: None       # set by the server, as the next two are
        self.on_delivered: Callable[[float], None] = lambda seconds: None      # how long a message had waited
        self.may_connect: Callable[[Site], bool] = lambda site: True

    # -- the loop's side

    def handle(self, report: Any, now: Now) -> None:
        """One report of a committer, a courier or the loader."""
        self._look_at_clock(now)
        if isinstance(report, list):
            for done, result in report:
                self._tell_one(done, result)
        elif isinstance(report, Outcome):
            self._on_outcome(report)
        elif isinstance(report, Loaded):
            self._on_loaded(report)
        elif isinstance(report, Routed):
            self._on_routed(report)
        elif isinstance(report, Greeted):
            self._on_greeted(report)
        elif isinstance(report, Finished):
            self._on_finished(report)
        elif isinstance(report, Answered):
            self._on_answered(report)
        elif isinstance(report, Heard):
            self._on_heard(report)
        elif isinstance(report, Unheard):
            self._on_unheard(report)

    def tick(self, now: Now) -> None:
        """What time has brought: connections, retries, expiry, saving."""
        self._look_at_clock(now)
        while self.retries and self.retries[0][0] <= now.mono:
            heapq.heappop(self.retries)[2]()
        if self.has_misplaced:
            self._place_anew()
        if not self.is_stopping:
            for courier, site in self.couriers.items():
                self._feed(courier, site)
            self._open_lines()          # for what those there do not take
        if now.mono >= self.next_sweep:
            self.next_sweep = now.mono + SWEEP_S
            self._sweep()

    def wake(self, now: Now) -> float:
        """The monotonic time at which tick() is next of use."""
        times = [max(self.next_sweep, at) for at in [self.next_save, *(at for at, _ in self.alerts.down.values())]]
        if self.retries:
            times.append(self.retries[0][0])
        for site in self.scheduler.sites.values():
            if site.entries and not self.is_stopping:
                at = site.wake(now)
                if at is not None:
                    times.append(at)
                if site.delays:
                    times.append(max(self.next_sweep, now.mono + site.delays[0][0] - now.wall))
                if site.overdue:
                    times.append(self.next_sweep)
                elif site.aging:
                    times.append(max(self.next_sweep, now.mono + site.aging[0][0] - now.wall))
        return min(times)

    def _tell_one(self, done: Callable[..., Any], *values: Any) -> None:
        """A bug in what one of them does is not the others'."""
        try:
            done(*values)
        except Exception as error:
            self.log.bug(error)

    def _look_at_clock(self, now: Now) -> None:
        """First of all: nothing must be judged by a wall clock that was set meanwhile."""
        self.now = now
        drift = now.wall - now.mono
        if abs(drift - self.drift) > CLOCK_JUMP_S:
            self.log.write("master", "the clock jumped by %d s: nothing expires before it was tried again"
                           % (drift - self.drift), "warning")
            for site in self.scheduler.sites.values():
                site.on_clock_jump(now, drift - self.drift)
                # Whose age the wall clock alone tells may have grown old while we were off; what came since has not.
                site.keep_ages(drift - self.drift, now, 0.0 if site.waits_for else self.began + self.drift)
            self.drift = drift

    def _sweep(self) -> None:
        self.drift = self.now.wall - self.now.mono      # small steps, and a clock that is slewed
        for site in list(self.scheduler.sites.values()):
            for entry in site.expired(self.now):
                self.end(site, entry, EXPIRED, "4.4.7", UNCOLLECTED if site.waits_for else site.last_error)
            for entry in site.delayed(self.now):
                self._tell_delay(site, entry)
            if not (site.name in self.cfg.domains or site.entries or site.is_held or site.is_collecting
                    or site in self.couriers.values()
                    or site in self.inquirers.values()):
                del self.scheduler.sites[site.name]     # of a notice, or a subdomain somebody wrote to once
                self._on_route(site.name, ())
        self.alerts.sweep(self.scheduler.sites.values(), self.free_space(), self.now, self.certificate_end)
        if self.now.mono >= self.next_save:
            self.next_save = self.now.mono + STATE_SAVE_S
            if self.is_dirty or self.memory.is_dirty:
                self.save_state()

    def keep_attempts(self) -> None:
        """At the end of a --flush without a daemon: what is past its time and was
        tried often enough ends; of the others the attempts are written down for the next run."""
        self._sweep()
        for site in list(self.scheduler.sites.values()):
            domain = "" if site.cfg.is_notices else site.name
            for entry in [site.entries[id] for id in site.overdue if id in site.entries]:
                if entry.state in (State.ACTIVE, State.DEFERRED) and self.failures_since(site, entry):
                    self._record(entry.id, Record(functools.partial(self._judge_failure, site.trouble, domain),
                                                  self.failures_since(site, entry), self.now.wall, 0.0), lambda done: None)

    @staticmethod
    def _judge_failure(error: str, domain: str, one: Mapping[str, Any]) -> Optional[Verdict]:
        """A connection failed.  What the primary said of the message itself before stays said."""
        if not is_part(one, domain):
            return None
        if one["last_status"][:2] == "5.":
            return Verdict(one["address"], QUEUED, one["last_status"], one["last_response"], one["last_remote"],
                           one["refused_since"])
        return Verdict(one["address"], QUEUED, "4.4.1", error, "", one["refused_since"])

    def free_space(self) -> int:
        if self.now.mono >= self.next_free:
            self.free, self.next_free = self.spool.free(), self.now.mono + SPACE_CHECK_S
        return self.free

    def _tell_delay(self, site: Site, entry: Entry, sent: Optional[Told] = None) -> None:
        attempts, cfg, ids, error = self.failures_since(site, entry), self.cfg, self.ids, site.trouble
        last = self.now.wall + site.last_start - self.now.mono if attempts else None
        told: Told = {} if sent is None else sent

        def written(done: Any) -> None:
            if isinstance(done, Recorded):
                self._note_record(done)
            elif isinstance(done, Corrupt):             # or gone, because it was delivered; what was told stays so
                for notice in _all_told(told)[0]:
                    self.accept(notice)
            else:
                self._log_failure(done)
                self.later(RETRY_DISK_S, lambda: self._tell_delay(site, entry, told))
        self.work(entry.id, Task(lambda spool: write_delay(
            spool, entry.id, attempts, last, error, cfg, ids, told)), written)

    @staticmethod
    def failures_since(site: Site, entry: Entry) -> int:
        return site.failures - entry.base

    def _mail_alert(self, alert: Dict[str, Any]) -> None:
        id, cfg, now = self.ids.new(), self.cfg, self.now.wall
        self.ids.coming.add(id)

        def kept(sidecar: Any) -> None:
            if isinstance(sidecar, Exception):
                self._log_failure(sidecar)
            else:
                self.accept(sidecar)
        self.committers.submit(Task(lambda spool: commit_own(
            spool, id, "alert", cfg.alerts_mail, format_alert(cfg, alert, id), cfg, now)), kept)

    def later(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.retries, (self.now.mono + seconds, id(what), what))

    def work(self, id: str, work: Work, done: Done) -> None:
        """Disk work on one message: one at a time, in order."""
        chain = self.chains.get(id)
        if chain is not None:
            chain.append((work, done))
            return
        self.chains[id] = collections.deque()
        self._submit(id, work, done)

    def _submit(self, id: str, work: Work, done: Done) -> None:
        def next_one(result: Any) -> None:
            chain = self.chains[id]
            if chain:
                self._submit(id, *chain.popleft())
            else:
                del self.chains[id]
            done(result)
        self.committers.submit(work, next_one)

    # -- loading

    def load(self) -> None:
        """Read the spool in a thread of its own; mail is accepted meanwhile.
        Again at SIGHUP, for pairs that were copied in."""
        if self.is_loading:
            self.must_reload = True     # what was copied since may be behind the reader
            return
        self.is_loading, self.must_reload = True, False
        self.gone.clear()
        known = {id for site in self.scheduler.sites.values() for id in site.entries}
        threading.Thread(target=self._load, args=(known, self.loads > 0), name="loader", daemon=True).start()
        self.loads += 1

    def _load(self, known: Set[str], is_patient: bool = False) -> None:
        """`is_patient`: the relay was running before, so that what is half may be on its way in."""
        orphans: List[str] = []
        found: List[Queued] = []
        remarks: List[str] = []
        faults: List[Tuple[str, str]] = []
        error = unread = ""
        is_unsettled = False
        try:
            for id in self.spool.names(orphans):
                if id in known:
                    continue
                try:
                    sidecar = self.spool.read_sidecar(id)
                    self.spool.check_body(id, sidecar)
                    found.append(summarize(sidecar))
                except Corrupt as problem:
                    if is_patient and self.spool.is_young(id):
                        is_unsettled = True
                    elif self.spool.has_sidecar(id):
                        faults.append((id, str(problem)))
                except OSError as problem:
                    unread = "%s: %s" % (id, problem.strerror)
                if len(found) >= LOAD_BATCH:
                    self.post(Loaded(tuple(found), tuple(remarks)))
                    found, remarks = [], []
            for id in orphans:
                if is_patient and self.spool.is_young(id):
                    is_unsettled = True
                else:
                    faults.append((id, "a body without a sidecar"))
            for id, why in faults:      # last, because the disk may have no room for that
                try:
                    try:
                        sidecar = self.spool.read_sidecar(id)
                        self.spool.check_body(id, sidecar)
                        found.append(summarize(sidecar))        # mended meanwhile
                    except Corrupt:
                        remarks.append(self.spool.set_aside(id, why))
                except OSError as problem:
                    unread = "%s: %s: %s" % (id, why, problem.strerror)
        except Exception as problem:    # the directory cannot be read; or a bug, which must not hide the mail
            error = printable(str(problem) or repr(problem))
        self.post(Loaded(tuple(found), tuple(remarks), True, error, unread, is_unsettled))

    def _on_loaded(self, report: Loaded) -> None:
        for remark in report.remarks:
            self.log.write("qmgr", remark, "warning")
        for queued in report.found:
            if queued.id not in self.gone and queued.id not in self.ids.coming:
                self._admit(queued)
        if not report.is_last:
            return
        self.is_loading = False
        self.load_error = report.error
        self.gone.clear()
        if report.error or report.unread:
            self.log.write("qmgr", "the spool could not be read whole: %s; trying again in %s" % (
                report.error or report.unread, format_duration(self.load_pause)), "error")
            self.later(self.load_pause, self.load)
            self.load_pause = min(2.0 * self.load_pause, RETRY_READ_S)
        elif report.is_unsettled:
            self.later(COPY_S, self.load)
        else:
            self.load_pause = RETRY_DISK_S
        if self.must_reload:
            self.load()
        early, self.early = self.early, set()
        for what in early:
            self.flush(what)

    def _admit(self, queued: Queued) -> None:
        """An entry for each site that has recipients of it, unless it is there already."""
        if not queued.domains:
            return self._remove(queued.id)      # finished, but a crash came before its removal
        sites: Dict[Site, None] = {}            # two recipients of a notice may share one
        for domain, (attempts, due, held) in queued.domains.items():
            site = self.scheduler.site(self.scheduler.site_of(queued.kind, domain), self.now)
            if queued.id not in site.entries:
                entry = Entry(queued.id, queued.size, queued.received, queued.received + site.cfg.lifetime, attempts)
                if self.is_offline:     # each run makes one attempt; before this one fails, too, nothing expires
                    entry.tries = min(attempts, ATTEMPTS_MIN - 1)
                site.add(entry, self.now, due, held)
            sites[site] = None
        if len(sites) > 1:
            self.scheduler.share(queued.id, list(sites))

    def commit(self, draft: Draft, blocks: List[bytes], sidecar: Dict[str, Any], then: Callable[[Any], None]) -> None:
        """Make a message durable.  `then` is called with None, to accept() it, or with the error."""
        def done(error: Any) -> None:
            self.ids.coming.discard(draft.id)
            then(error)
        self.ids.coming.add(draft.id)
        self.committers.submit(Commit(draft, blocks, sidecar), done)

    def accept(self, sidecar: Mapping[str, Any], is_undecided: bool = False) -> None:
        """A message that is on stable storage since a moment ago; `is_undecided`: cut_through() comes next."""
        queued = summarize(sidecar)
        self.ids.coming.discard(queued.id)
        self._admit(queued)
        self.is_dirty = True
        addresses: Dict[str, List[str]] = {}
        for one in sidecar["recipients"]:
            addresses.setdefault(self.scheduler.site_of(sidecar["kind"], one["domain"]), []).append(one["address"])
        for name, its in addresses.items():
            self.fresh.setdefault(name, {})[queued.id] = tuple(its)
            if not is_undecided:
                self.scheduler.sites[name].counters["accepted"] += 1
        self.log.write("qmgr", "%s: from=<%s>, size=%d, nrcpt=%d (queue active)" % (
            queued.id, printable(sidecar["sender"]), queued.size, len(sidecar["recipients"])))
        for name in addresses:
            site = self.scheduler.sites[name]
            if site.waits_for and not site.is_collecting:
                self._log_waiting(site, site.waits_for)

    # -- connections

    def _open_lines(self) -> None:
        """Connections where they are wanted.  When they run short, a primary
        without any comes before others, and whoever waited longest first."""
        wanting = [site for site in self.scheduler.sites.values()
                   if site.entries and site.wanted(self.now) and self.may_connect(site)]
        if not wanting or self.is_stalled:
            return
        lines = collections.Counter(site.name for site in self.couriers.values())
        notices = sum(site.cfg.is_notices for site in self.couriers.values())
        wanting.sort(key=lambda site: (lines[site.name], site.last_start))
        for site in wanting:
            if len(self.couriers) < self._lines_for(site, lines[site.name]) and not (
                    site.cfg.is_notices and notices >= NOTICE_LINES_MAX):
                notices += site.cfg.is_notices
                self._connect(site)
            elif not lines[site.name] and site.state is not Primary.DOWN and not site.cfg.is_notices:
                self._make_room(lines)

    @staticmethod
    def _lines_for(site: Site, has: int) -> int:
        """So many connections to all may there be for this site to get one (more).
        Dead servers hold theirs for long and live ones use many: neither may take the last."""
        if site.state is Primary.DOWN:
            return LINES_MAX // 2 if has else LINES_MAX - LINES_RESERVED
        return LINES_MAX - LINES_RESERVED if has or site.cfg.is_notices else LINES_MAX

    def _make_room(self, lines: Mapping[str, int]) -> None:
        """Somebody has no connection and there is none left: whoever has most gives one back after its message."""
        if not any(courier.is_leaving for courier in self.couriers):
            greeted = [courier for courier in self.couriers if courier.is_greeted]
            courier = max(greeted, key=lambda one: lines[self.couriers[one].name], default=None)
            if courier is not None:
                courier.leave()

    def _is_surplus(self, site: Site) -> bool:
        """Whether one connection less is wanted: they were halved, or it is to get one message at a time."""
        return sum(its is site and courier.is_greeted and not courier.is_leaving
                   for courier, its in self.couriers.items()) > site.limit

    def _connect(self, site: Site) -> None:
        site.on_started(self.now)
        plan = self.plan(site)
        courier = Courier(self.spool, plan, self.post)
        self.couriers[courier] = site
        try:
            courier.start()
        except RuntimeError as error:           # no more threads
            self._on_finished(Finished(courier, str(error)))

    def plan(self, site: Site) -> Plan:
        known = tuple(site.route) if self.now.wall - site.route_seen < site.cfg.lifetime else ()
        login = (self.cfg.bounces_username, self.cfg.bounces_password) if site.name == NOTICES else None
        primary = (Endpoint(site.home, SMTP_PORT),) if site.home else site.cfg.primary
        return Plan(site.name, site.cfg, primary, self.cfg.hostname, Resolver(self.cfg.nameservers), self.listeners,
                    known, login if login and login[0] else None, not site.is_odd, site.is_wary)

    @property
    def is_stalled(self) -> bool:
        """The disk lags behind with what became of the mail: no more is given out."""
        return len(self.chains) + len(self.unrecorded) >= UNRECORDED_MAX

    def _feed(self, courier: Courier, site: Site) -> None:
        if not courier.is_greeted or courier.is_leaving or self.is_stalled:
            return                      # tick() comes back
        self._load_up(courier, site)
        while isinstance(courier, Turnaround) and not courier.jobs and not courier.is_leaving:
            if courier.left:
                self.couriers[courier] = courier.left.popleft()
                self._load_up(courier, self.couriers[courier])
            else:
                courier.leave()

    def _load_up(self, courier: Courier, site: Site) -> None:
        if site.open > site.limit and not isinstance(courier, Turnaround) and self._is_surplus(site):
            return courier.leave()
        if not (site.is_due(self.now) or site.state is Primary.REJECTING):
            return
        share = site.share()
        if len(courier.jobs) >= min(JOBS_REFILL, share):
            return
        for entry in site.take(min(JOBS_PER_CONNECTION, share - len(courier.jobs)), self.now):
            courier.jobs[entry.id] = entry
            courier.inbox.put(Job(entry.id, "" if site.cfg.is_notices else site.name))

    def turn_around(self, sites: Sequence[Site], hop: Hop, sock: socket.socket, unsaid: bytes, early: bytes,
                    on_over: Callable[[], None]) -> None:
        """ATRN was granted.  From here on the socket is the courier's; when that has ended, `on_over` is called."""
        courier = Turnaround(self.spool, self.plan(sites[0]), self.post, hop, sock, unsaid, early)
        courier.sites, courier.left, courier.on_over = tuple(sites), collections.deque(sites[1:]), on_over
        self.couriers[courier] = sites[0]
        for site in sites:
            site.is_collecting = True
            site.last_start = self.now.mono
            site.release_all()
        try:
            courier.start()
        except RuntimeError as error:           # no more threads
            courier.client.close()
            self._on_finished(Finished(courier, str(error)))

    def cut_silent(self, sites: Sequence[Site]) -> None:
        """Whoever collects asks again: the connection before may be one that nobody has hung up.
        Not while it is we who keep it waiting, nor while the fate of a message is in its hands."""
        for courier in self.couriers:
            if (isinstance(courier, Turnaround) and not set(sites).isdisjoint(courier.sites) and not self.is_stalled
                    and self.now.mono - courier.client.moved > ATRN_SILENT_S
                    and not any(leg.is_sent for leg in tuple(courier.flight))):
                courier.cut()

    def _on_turned(self, courier: Turnaround, error: str) -> None:
        courier.on_over()
        for site in courier.sites:
            site.on_left(self.now, error, courier.is_greeted)
            if site.waits_for:
                self._end_watches(site, site.trouble)
        if error:
            self.log.write("smtp", "%s: %s" % (",".join(site.label for site in courier.sites), error))

    def _on_routed(self, report: Routed) -> None:
        line = report.line
        line.hops = report.hops
        site = self.inquirers[line] if isinstance(line, Inquirer) else self.couriers[line]      # type: ignore[index]
        if line.is_former:
            return
        if not site.cfg.is_notices:
            self._on_route(site.name, [hop.address for hop in report.hops])
        if report.warning and report.warning != site.last_error:
            self.log.write("primary", "%s: %s" % (site.label, report.warning), "warning")

    def _on_greeted(self, report: Greeted) -> None:
        courier, site = report.courier, self.couriers[report.courier]
        courier.is_greeted = True
        if courier.is_former:
            return
        if isinstance(courier, Turnaround):
            sites = courier.sites
            for one in sites:
                self._say_up(one, one.state, one.on_came(self.now))
        else:
            sites = (site,)
            self._keep_route(site, courier, report.hop)
            self._say_up(site, site.state, site.on_connected(self.now))
        self._keep_size(sites, report.size_limit)
        self._feed(courier, site)

    def _keep_size(self, sites: Sequence[Site], limit: int) -> None:
        """What the primary takes at most, the door takes at most."""
        if any(one.size_limit != limit for one in sites):
            for one in sites:
                one.size_limit = limit
            self.on_size_limit()

    def _keep_route(self, site: Site, line: Line, hop: Hop) -> None:
        hops = line.hops if hop in line.hops else (hop, *line.hops)
        site.route = list(hops[:ROUTE_HOSTS_MAX])       # all of it, in its order: the host that greeted may be down next time
        site.route_seen = self.now.wall

    def _say_up(self, site: Site, was: Primary, lasted: Optional[float]) -> None:
        if was in (Primary.UNKNOWN, Primary.DOWN):
            after = " after %s" % format_duration(lasted) if lasted is not None else ""
            self._say(site, "up", "up%s, %d messages waiting" % (after, len(site.entries)))

    def _say(self, site: Site, event: str, text: str) -> None:
        """A primary's state has changed."""
        self.log.write("primary", "%s: %s" % (site.label, printable(text)), "warning" if event == "rejecting" else "info")
        self.is_dirty = True
        if not site.cfg.is_notices:     # of those there may be thousands, one for each domain that spam names
            self.save_state()
            self.alerts.on_state(site, event, text, self.now)

    def _on_finished(self, report: Finished) -> None:
        courier = report.courier
        site = self.couriers.pop(courier)
        for entry in courier.jobs.values():
            if site.entries.get(entry.id) is entry and entry.state is State.DELIVERING:
                site.give_back(entry)
        if report.bug is not None:
            self.log.bug(report.bug)
        if courier.is_former:
            return
        for one in courier.sites if isinstance(courier, Turnaround) else (site,):
            one.is_odd = one.is_odd or courier.is_out_of_step
            one.is_wary = courier.is_in_doubt or (one.is_wary and bool(report.error))
        if isinstance(courier, Turnaround):
            return self._on_turned(courier, report.error)
        if self.is_stopping:
            return
        if courier.is_greeted:
            begins = site.on_closed(self.now, report.error)
        else:
            begins = site.on_failed(self.now, report.error)
        if report.error:
            self.log.write("smtp", "%s: %s" % (site.label, report.error), "info" if courier.is_greeted else "debug")
        if begins:
            self._say(site, "down", "down: %s, %d messages waiting" % (report.error, len(site.entries)))
        if site.state is Primary.DOWN and report.error:
            self._let_go_all(site)
            self._log_waiting(site, report.error)
            if not site.round_left:
                self._end_watches(site, report.error)

    def _end_watches(self, site: Site, error: str) -> None:
        """Nothing of it leaves soon: a --flush that waits has its answer."""
        for watch in [watch for watch in self.watches if watch.needs_primary]:
            for name, id in [pair for pair in watch.left if pair[0] == site.name]:
                watch.settle(name, id, "deferred", error)

    def _log_waiting(self, site: Site, error: str) -> None:
        """Each message says once in the log that it waits, not at every probe."""
        for id, addresses in self.fresh.pop(site.name, {}).items():
            entry = site.entries.get(id)
            if entry is not None and entry.state is not State.DELIVERING:
                site.counters["deferred"] += 1
                delay = max(0.0, self.now.wall - entry.received)
                for address in addresses:
                    self._log_delivery(id, address, "none", delay, 0.0, "4.4.1", "deferred", error)

    def _log_delivery(self, id: str, address: str, relay: str, delay: float, seconds: float, status: str, what: str,
                      why: str) -> None:
        self.log.write("smtp", "%s: to=<%s>, relay=%s, delay=%s, delays=0/%s/0/%s, dsn=%s, status=%s (%s)" % (
            id, printable(address), relay, format_delay(delay), format_delay(max(0.0, delay - seconds)), format_delay(seconds),
            status, what, printable(why)))

    # -- outcomes

    def _on_outcome(self, outcome: Outcome) -> None:
        self.last_outcome = self.now.mono
        courier = outcome.courier
        site = self.couriers[courier]
        entry = courier.jobs.pop(outcome.job.id)
        site.handed.discard(entry.id)
        is_ours = site.entries.get(entry.id) is entry       # else an operator removed it meanwhile
        if outcome.fault is not None:
            if is_ours:
                self._on_fault(site, entry, outcome.fault)
        elif not outcome.results:
            if is_ours:
                site.give_back(entry)
        else:
            verdicts = self._judge(site, outcome)
            if is_ours:
                self._settle(site, entry, outcome, verdicts)
            else:
                self._log_verdicts(outcome, verdicts)
        self._feed(courier, site)

    def _on_fault(self, site: Site, entry: Entry, fault: Exception) -> None:
        """The message could not be read."""
        if isinstance(fault, Settled):
            self._leave(site, entry.id, "deleted")
        elif isinstance(fault, Corrupt):
            self._set_aside(entry.id, str(fault))
        else:
            self.log.write("qmgr", "%s: cannot be read: %s" % (entry.id, fault), "error")
            site.defer(entry, self.now, RETRY_DISK_S)
            self._tell(site, entry.id, "deferred", str(fault))

    def _set_aside(self, id: str, why: str) -> None:
        for site in self.scheduler.holding(id):
            self._leave(site, id, "deleted")

        def moved(remark: Any) -> None:
            self.log.write("qmgr", str(remark), "warning")
            if isinstance(remark, OSError):
                self.later(RETRY_DISK_S, lambda: self._set_aside(id, why))
        self.work(id, Task(lambda spool: spool.set_aside(id, why)), moved)

    def _judge(self, site: Site, outcome: Outcome) -> List[Verdict]:
        verdicts = []
        for result in outcome.results:
            since = result.refused_since
            if since is not None and since < site.pardoned:
                since = None            # said while it was not itself
            if result.kind == "sent":
                state, since = DELIVERED, None
            elif result.kind == "refused" and site.is_final(self.now, since, self._was_good(result)):
                state = BOUNCED
            else:
                state = QUEUED
                if result.kind == "refused":            # one in the future was written before the clock was set back
                    since = min(since or self.now.wall, self.now.wall)
            verdicts.append(Verdict(result.address, state, result.status, result.response, result.remote, since, result.is_told))
        return verdicts

    def _was_good(self, result: Result) -> bool:
        """Whether a refusal is of a recipient that the primary took before."""
        return not result.is_content and self.memory.is_good(result.address, self.now.wall)

    def _log_verdicts(self, outcome: Outcome, verdicts: Iterable[Verdict]) -> None:
        delay = max(0.0, self.now.wall - outcome.received)
        for verdict in verdicts:
            word = {DELIVERED: "sent", BOUNCED: "bounced"}.get(verdict.state, "deferred")
            self._log_delivery(outcome.job.id, verdict.address, outcome.relay, delay, outcome.seconds, verdict.status, word,
                               verdict.response)

    def _settle(self, site: Site, entry: Entry, outcome: Outcome, verdicts: List[Verdict]) -> None:
        """Write the verdicts down; the message stays DELIVERING until that is done."""
        self._learn(site, outcome, {verdict.state for verdict in verdicts})
        if site.state is Primary.REJECTING:
            verdicts = self._judge(site, outcome)       # perhaps only since this one: it is not returned
        waiting = self.waiting.get(entry.id)
        if waiting is not None and site.name in waiting.left:
            if all(result.kind == "refused" for result in outcome.results):
                return self._refused(entry.id, waiting, site, outcome, lambda: self._write(site, entry, outcome, verdicts))
            self._let_go(entry.id)
        self._write(site, entry, outcome, verdicts)

    def _learn(self, site: Site, outcome: Outcome, states: Set[str]) -> None:
        """What an outcome says of the primary and of the recipients."""
        if outcome.courier.is_former:
            return
        was = site.state
        kinds = {result.kind for result in outcome.results}
        if "sent" in kinds:
            if site.on_taken(self.now, outcome.pace_s):
                self._say(site, "up", "up after rejecting for %s, %d messages waiting" % (
                    format_duration(self.now.wall - site.rejected_since), len(site.entries)))
        elif kinds == {"refused"} and site.on_refused(self.now, outcome.job.id, [
                result.address for result in outcome.results if self._was_good(result)]):
            self._on_rejecting(site, outcome.results[0].response)
        elif QUEUED in states and any(result.remote for result in outcome.results):     # the primary's word, not ours
            site.on_deferred(self.now)
        if site.state is Primary.REJECTING or (was is Primary.REJECTING and "sent" not in kinds):
            site.last_error = site.last_error or outcome.results[0].response
            return                      # it is not itself
        if site.cfg.is_notices:
            return                      # who takes our notices is nobody's recipient here
        for result in outcome.results:
            kept = QUEUED in states and self._was_good(result)
            if result.is_good or (result.is_good is False and not kept and site.is_itself(self.now)):
                self.memory.learn(result.address, result.is_good, self.now.wall)

    def _on_rejecting(self, site: Site, response: str) -> None:
        """It is there but refuses everybody: sending stops, and what it said is forgotten."""
        self.memory.forget_bad(site.name, site.recovered)
        for courier, its in self.couriers.items():
            if its is site and courier.is_greeted and not courier.is_leaving and not isinstance(courier, Turnaround):
                courier.leave()         # with what it has not begun; who came for several domains goes on with the next
        self._let_go_all(site)
        self._end_watches(site, response)
        self._say(site, "rejecting", "rejecting: %s, %d messages waiting" % (response, len(site.entries)))

    def _write(self, site: Site, entry: Entry, outcome: Outcome, verdicts: List[Verdict]) -> None:
        states = {verdict.state for verdict in verdicts}
        for state in states:
            site.counters[COUNTERS[state]] += 1
        self.is_dirty = True
        self._log_verdicts(outcome, verdicts)
        if states == {DELIVERED} and outcome.is_whole and not outcome.wants_report:
            return self._remove(entry.id, lambda: self._leave(site, entry.id, "delivered"))
        attempts = site.count_attempt(entry)
        pause = site.pause(entry.deferrals, self.now)
        if any(result.status == "4.4.2" for result in outcome.results):     # no verdict on the message: it broke off
            pause = min(pause, PROBE_FIRST_S * 4.0 ** min(entry.deferrals - 1, 20))

        def recorded(done: Recorded) -> None:
            if site.entries.get(entry.id) is not entry:
                return
            domain = outcome.job.domain
            if any(one["state"] == QUEUED and is_part(one, domain) for one in done.sidecar["recipients"]):
                site.defer(entry, self.now, pause)
                self._tell(site, entry.id, "deferred", next(one.response for one in verdicts if one.state == QUEUED))
            else:
                self._leave(site, entry.id, "bounced" if BOUNCED in states else "delivered")
        by_address = {verdict.address: verdict for verdict in verdicts}

        def put_off(error: str) -> None:
            """A deferral that is not written down costs knowledge; insisting on it would keep mail from leaving a full disk."""
            if site.entries.get(entry.id) is entry:
                site.defer(entry, self.now, pause)
                self._tell(site, entry.id, "deferred", error)
        self._record(entry.id, Record(lambda one: by_address.get(one["address"]), attempts, self.now.wall,
                                      self.now.wall + pause), recorded, put_off if states == {QUEUED} else None)

    # -- cut-through

    def cut_through(self, sidecar: Mapping[str, Any], answer: Callable[[Optional[Reply]], None]) -> None:
        """A message that was just accepted; its client waits.  `answer` gets
        the primary's refusal of all its recipients, and then the message is
        gone, or None: it was taken, or stays queued."""
        id = sidecar["id"]
        sites = self.scheduler.holding(id)

        def decided(refusal: Optional[Reply]) -> None:
            for site in sites if refusal is None else ():
                site.counters["accepted"] += 1
            answer(refusal)
        if self.is_stopping or self.is_stalled or not sites or not all(site.may_cut_through(self.now) for site in sites):
            return decided(None)
        self.waiting[id] = CutThrough((site.name for site in sites), decided)
        for site in sites:
            site.urge(site.entries[id])
        self.later(CUT_THROUGH_S, lambda: self._let_go(id))

    def _let_go(self, id: str) -> None:
        """The client waits no longer: the message is ours."""
        waiting = self.waiting.pop(id, None)
        if waiting is not None:
            for put_off in waiting.put_off:
                put_off()
            waiting.answer(None)

    def _let_go_all(self, site: Site) -> None:
        """Nothing comes of waiting for this primary's verdicts now."""
        for id in [id for id, waiting in self.waiting.items() if site.name in waiting.left]:
            self._let_go(id)

    def _refused(self, id: str, waiting: CutThrough, site: Site, outcome: Outcome, put_off: Callable[[], None]) -> None:
        waiting.left.discard(site.name)
        waiting.put_off.append(put_off)
        result = outcome.results[0]
        code, _, text = result.response.partition(" ")
        text = text[len(result.status):].lstrip(" ") if text.startswith(result.status) else text
        text = text.encode("ascii", "backslashreplace").decode("ascii")         # RFC 6531 3.7.4
        waiting.refusal = waiting.refusal or Reply(int(code), result.status, text)
        if waiting.left:
            return

        def removed() -> None:
            for site in self.scheduler.holding(id):
                self._leave(site, id, "bounced")
            waiting.answer(waiting.refusal)
        del self.waiting[id]
        self._remove(id, removed)

    def _record(self, id: str, record: Record, then: Callable[[Recorded], None],
                otherwise: Optional[Callable[[str], None]] = None, sent: Optional[Told] = None) -> None:
        """Change a sidecar, with the notices that go before; tried until the
        disk takes it, because a delivery not written down would happen twice.
        `otherwise`, where it is given, is called with the error instead of trying again."""
        told: Told = {} if sent is None else sent

        def written(done: Any) -> None:
            if isinstance(done, Corrupt):
                self.unrecorded.discard(id)
                for notice in _all_told(told)[0]:
                    self.accept(notice)
                return self._set_aside(id, str(done))
            if not isinstance(done, Recorded):
                error = printable(str(done))
                self.log.write("qmgr", "%s: cannot be recorded%s: %s" % (id, "" if otherwise else ", trying again", error),
                               "error")
                if otherwise is not None:
                    return otherwise(error)
                self._tell_stuck(id, error)
                return self.later(RETRY_DISK_S, lambda: self._record(id, record, then, None, told))
            self.unrecorded.discard(id)
            self._note_record(done)
            if done.is_finished:
                return self._remove(id, lambda: then(done))
            then(done)
        cfg, ids = self.cfg, self.ids
        self.work(id, Task(lambda spool: write_record(spool, id, record, cfg, ids, told)), written)

    def _note_record(self, done: Recorded) -> None:
        for notice in done.notices:
            self.accept(notice)
        for remark in done.remarks:
            self.log.write("bounce", remark)

    def _remove(self, id: str, then: Callable[[], None] = lambda: None) -> None:
        """Nothing of the message is left to do: it may leave the spool."""
        def removed(error: Optional[Exception]) -> None:
            if error is not None:
                self.log.write("qmgr", "%s: cannot be removed, trying again: %s" % (id, printable(str(error))), "error")
                self._tell_stuck(id, printable(str(error)))
                return self.later(RETRY_DISK_S, lambda: self._remove(id, then))
            self.unrecorded.discard(id)
            if self.is_loading:
                self.gone.add(id)
            then()
            self.log.write("qmgr", "%s: removed" % id)
        self.work(id, Remove(id), removed)

    def _tell_stuck(self, id: str, error: str) -> None:
        """The disk does not take what became of a message: it will be tried until it does, but nobody need wait for that."""
        self.unrecorded.add(id)
        for site in self.scheduler.holding(id):
            self._tell(site, id, "deferred", error)

    def _leave(self, site: Site, id: str, kind: str) -> None:
        if kind == "delivered" and not site.cfg.is_notices:
            self.on_delivered(self.now.wall - site.entries[id].received)
        self.scheduler.drop(site, id)
        its = self.fresh.get(site.name, {})
        its.pop(id, None)
        if not its:
            self.fresh.pop(site.name, None)
        self._tell(site, id, kind)
        if kind != "bounced":
            self._let_go(id)

    def _tell(self, site: Site, id: str, kind: str, error: str = "") -> None:
        for watch in self.watches:
            watch.settle(site.name, id, kind, error)

    def end(self, site: Site, entry: Entry, state: str, status: str = "", error: str = "") -> None:
        """End a site's part of a message: EXPIRED, or BOUNCED or DELETED by an
        operator.  A message whose last answer names a fault of its own
        (5.3.4, 5.6.7) expires with that, not as a timeout."""
        attempts = site.start(entry)
        domain = "" if site.cfg.is_notices else site.name

        def judge(one: Mapping[str, Any]) -> Optional[Verdict]:
            if not is_part(one, domain):
                return None
            if state == EXPIRED and (one["last_status"][:2] == "5." or not error):
                own = one["last_status"] if one["last_status"][:2] == "5." else status
                return Verdict(one["address"], state, own, one["last_response"], one["last_remote"])
            return Verdict(one["address"], state, status, error, "")

        def ended(done: Recorded) -> None:
            for verdict in done.verdicts:
                if state != DELETED:
                    self._log_delivery(entry.id, verdict.address, "none", self.now.wall - entry.received, 0.0, verdict.status,
                                       state, verdict.response)
            if state != DELETED:
                site.counters[COUNTERS[state]] += 1
            if site.entries.get(entry.id) is entry:
                self._leave(site, entry.id, state)
        last = self.now.wall + site.last_start - self.now.mono if attempts else None
        self._record(entry.id, Record(judge, attempts, last, 0.0), ended)

    # -- questions to a primary

    def ask(self, site: Site, address: str, then: Callable[[str, str], None]) -> None:
        """Whether the primary takes a recipient, or, with an empty address,
        whether it is there.  `then` is called with good, bad, silent or down, and
        a reply; at the latest after CALL_AHEAD_S.  Sessions that ask the same share the answer."""
        key = (site.name, address)
        waiting = self.questions.get(key)
        if waiting is not None:
            return waiting.append(then)
        waiting = self.questions[key] = [then]

        def give_up() -> None:
            if self.questions.get(key) is waiting:      # and not a later question for the same
                self._tell_all(site.name, address, "down", "")
        self.later(CALL_AHEAD_S, give_up)
        mine = [inquirer for inquirer, its in self.inquirers.items()
                if its is site and not inquirer.is_former]
        inquirer = min(mine, key=lambda one: len(one.open), default=None)
        if inquirer is None and len(self.inquirers) >= LINES_MAX:
            return self.later(0.0, give_up)     # not from within: the asker may have many more behind this one
        if inquirer is None or (len(inquirer.open) >= QUESTIONS_PER_INQUIRER and len(mine) < INQUIRERS_MAX):
            inquirer = Inquirer(self.plan(site), self.post)
            self.inquirers[inquirer] = site
            site.last_start = self.now.mono
            try:
                inquirer.start()
            except RuntimeError as error:       # no more threads
                return self._on_unheard(Unheard(inquirer, str(error)))
            if address and self.memory.takes_all(site.name, self.now.wall) is None:
                inquirer.stranger = "%s@%s" % (secrets.token_hex(8), site.name)
                inquirer.inbox.put(inquirer.stranger)
        inquirer.open.add(address)
        inquirer.inbox.put(address)

    def _tell_all(self, name: str, address: str, word: str, text: str) -> None:
        for then in self.questions.pop((name, address), ()):
            self._tell_one(then, word, text)

    def _on_heard(self, report: Heard) -> None:
        site = self.inquirers[report.inquirer]
        if report.inquirer.is_former:
            return
        self._keep_route(site, report.inquirer, report.hop)
        self._keep_size([site], report.size_limit)
        self._say_up(site, site.state, site.on_heard(self.now))

    def _on_answered(self, report: Answered) -> None:
        site = self.inquirers[report.inquirer]
        address, word = report.address, report.word
        report.inquirer.open.discard(address)
        if report.inquirer.is_former:
            return self._tell_all(site.name, address, "silent", report.text)
        site.last_heard = self.now.mono
        is_itself = site.is_itself(self.now)
        if not is_itself and (site.state is Primary.REJECTING or (word == "bad" and site.entries)):
            word = "silent"             # it has yet to take what waits for it
        if address and address == report.inquirer.stranger:
            if word in ("good", "bad"):
                self.memory.learn_accept_all(site.name, word == "good", self.now.wall)
            return
        if word == "good" or (word == "bad" and is_itself):
            self.memory.learn(address, word == "good", self.now.wall)
        self._tell_all(site.name, address, word, report.text)

    def _on_unheard(self, report: Unheard) -> None:
        site = self.inquirers.pop(report.inquirer)
        if report.bug is not None:
            self.log.bug(report.bug)
        if report.error and not report.inquirer.hop.address and not report.inquirer.is_former and site.on_unheard(
                self.now, report.error):
            self._say(site, "down", "down: %s, %d messages waiting" % (report.error, len(site.entries)))
        for address in report.inquirer.open:
            self._tell_all(site.name, address, "down", report.error)

    # -- commands

    def flush(self, what: str) -> bool:
        """ETRN, --flush and SIGUSR1 meet here.  False when a flush was under way already."""
        if self.is_loading:
            self.early.add(what)
        return self.flush_sites(self.scheduler.matching(what))

    def heal(self, sites: Iterable[Site]) -> None:
        """--flush: the operator says that rejecting primaries are themselves again."""
        for site in sites:
            if site.heal(self.now):
                self._say(site, "up", "up by command after rejecting for %s, %d messages waiting" % (
                    format_duration(self.now.wall - site.rejected_since), len(site.entries)))

    def flush_sites(self, sites: Iterable[Site]) -> bool:
        sites = [site for site in sites if not site.is_held]
        fresh = [site.flush(self.now) for site in sites]    # each of them, whatever another says
        for site in sites:
            if site.waits_for and not site.is_collecting:
                self._end_watches(site, site.trouble)
        return all(fresh)

    def move(self, what: str, address: str) -> None:
        """An authenticated ETRN: where `primary = etrn`, the primary is where it came from."""
        for cfg in self.scheduler.meant(what):
            if cfg.primary != "etrn" or self.scheduler.homes.get(cfg.name) == address:
                continue
            moved = self.scheduler.move(cfg, address, self.now)
            self.log.write("primary", "%s: at %s since an authenticated ETRN" % (cfg.name, address))
            self._part(moved, True)
            self.save_state()

    def _part(self, moved: Sequence[Site], is_gone: bool) -> None:
        """These sites have another primary: what their former one still says settles
        the messages that it has, and nothing else.  `is_gone`: that is not waited for long."""
        for line, site in [*self.couriers.items(), *self.inquirers.items()]:
            if site not in moved or line.is_former or isinstance(line, Turnaround):
                continue
            line.is_former = True
            if isinstance(line, Courier):
                site.on_parted(line.is_greeted)
                for id in line.recall():                # what it has not begun is for the new one
                    entry = line.jobs.pop(id)
                    if site.entries.get(id) is entry:
                        site.give_back(entry)
                site.handed.difference_update(line.jobs)
                line.leave()
                if is_gone:             # perhaps not quite: an answer that is under way saves a second copy
                    self.later(PART_S, line.cut)
            else:
                line.cut()

    def watch(self, left: Iterable[Tuple[str, str]], needs_primary: bool = True) -> Watch:
        watch = Watch(left, needs_primary)
        self.watches.append(watch)
        return watch

    def settle_idle(self, watch: Watch) -> None:
        """What was held meanwhile, or is to be collected now, is not waited for."""
        for name, id in list(watch.left):
            site = self.scheduler.sites.get(name)
            entry = site and site.entries.get(id)
            if site is None or entry is None:
                watch.settle(name, id, "deleted")
            elif entry.state is State.HOLD:
                watch.settle(name, id, "deferred", "held by command")
            elif site.waits_for and not site.is_collecting:
                watch.settle(name, id, "deferred", site.trouble)

    def on_client(self, address: str) -> None:
        """Somebody connected.  A primary that does so is back."""
        for name in self.callers.get(address, ()):
            site = self.scheduler.sites.get(name)
            if site is not None and site.entries and site.state is not Primary.UP:
                site.trigger(self.now)

    def may_know(self, address: str, sites: Iterable[Site]) -> bool:
        """Whether a client may be told how much waits: one of ours, or the primary itself."""
        return self.cfg.is_trusted(address) or all(site.name in self.callers.get(address, ()) for site in sites)

    def hold(self, what: str, on: bool, done: Done) -> int:
        """An ID, a domain (later mail for it too), or all.  Returns the number
        of messages meant; `done` is called when it is on stable storage."""
        holding = self.scheduler.holding(what)
        for site in () if on else holding or self.scheduler.matching(what):
            site.watched_since = self.now.mono
        if holding:
            for site in holding:
                site.hold(site.entries[what], on)
            self._write_hold(what, done)
            return 1
        count = 0
        for name in [*self.cfg.domains, what]:      # no mail may have come for them yet
            if name[0] not in ".@" and self.scheduler.is_served(name):
                self.scheduler.site(name, self.now)
        for site in self.scheduler.matching(what):
            count += len(site.entries)
            for entry in site.hold_all(on):
                self._write_hold(entry.id, self._log_failure)
        self.save_state(done)
        return count

    def _write_hold(self, id: str, done: Done) -> None:
        held = sorted(site.name for site in self.scheduler.holding(id) if site.entries[id].hold)

        def change(sidecar: Dict[str, Any]) -> None:
            sidecar["held"] = held
        self.work(id, Task(lambda spool: spool.update(id, change)), done)

    def _log_alert(self, text: str) -> None:
        self.log.write("master", "alert not told by %s" % text, "error")

    def _log_failure(self, result: Any) -> None:
        if isinstance(result, Exception):
            self.log.write("qmgr", "cannot be recorded: %s" % printable(str(result)), "error")

    # -- state.json

    def save_state(self, then: Optional[Callable[[Any], None]] = None) -> None:
        """`then` is called when it is on stable storage.  Without, one that waits for the disk already will do."""
        if then is None and self.saving > 1:
            self.is_dirty = True        # with the next
            return
        self.saving += 1
        self.is_dirty = False
        sites = {site.name: {"primary": site.state.value, "since": site.since, "recovered": site.recovered,
                             "pardoned": site.pardoned, "last_error": site.last_error, "held": site.is_held,
                             "size_limit": site.size_limit,
                             "route": [list(hop) for hop in site.route], "route_seen": site.route_seen,
                             "route_of": format_primary(site.cfg.primary), "told": site.name in self.alerts.told,
                             "counters": dict(site.counters)}
                 for site in self.scheduler.sites.values()}
        state = {"format": FORMAT, "saved": self.now.wall, "sites": sites, "homes": dict(self.scheduler.homes)}
        memory = self.memory.to_values(self.now.wall) if self.memory.is_dirty else None
        self.saves = number = self.saves + 1

        def save(spool: Spool) -> None:
            spool.save_state(state, memory, number)
            release_memory()            # now and then, and not in the loop

        def saved(result: Any) -> None:
            self.saving -= 1
            if isinstance(result, Exception):
                self.is_dirty = True
                self.memory.is_dirty = self.memory.is_dirty or memory is not None       # again with the next save
            self._log_failure(result)
            if then is not None:
                then(result)
        self.committers.submit(Task(save), saved)

    def load_state(self) -> None:
        """What was known before the restart.  A primary that was up is unknown now;
        one that was down still is, so that its return is the end of an outage."""
        self.memory.from_values(self.spool.load_state("recipients.json"))
        state = self.spool.load_state()
        self.scheduler.homes = known_homes(state, self.cfg)
        sites = state.get("sites")
        for name, known in sites.items() if isinstance(sites, dict) else ():
            try:
                if known["held"] is True:       # an order, and no knowledge: it holds whatever the rest is
                    self.scheduler.site(name, self.now).is_held = True
                primary = self.scheduler.config_of(name).primary
                route = parse_known_route(known, primary)
                limit = int(known["size_limit"]) if known["route_of"] == format_primary(primary) else 0
                seen, held = float(known["route_seen"]), bool(known["held"])
                counters = {key: int(known["counters"].get(key, 0)) for key in COUNTERS.values()}
                since, recovered, was = float(known["since"]), float(known["recovered"]), str(known["primary"])
                pardoned = float(known.get("pardoned", 0.0))
                if not all(0 <= one < TIME_MAX for one in (seen, since, recovered, pardoned)):
                    raise ValueError("not a time")
                error = printable(str(known["last_error"]))
            except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
                continue                # written by hand, or by another version: only knowledge is lost
            if not held and not self.scheduler.is_served(name):
                continue
            site = self.scheduler.site(name, self.now)
            site.route, site.route_seen, site.size_limit, site.is_held = route, seen, limit, held
            site.counters.update(counters)
            site.recovered = min(recovered, self.now.wall)
            site.pardoned = self.now.wall if was == Primary.REJECTING.value else min(pardoned, self.now.wall)
            if was in (Primary.DOWN.value, Primary.REJECTING.value) and not site.waits_for:
                site.state, site.since, site.was_away = Primary.DOWN, min(since, self.now.wall), True
                site.last_error = error
                self.alerts.on_known(site, known.get("told") is True, self.now)
            self._on_route(name, [hop.address for hop in route])

    def _on_route(self, name: str, hosts: Iterable[str]) -> None:
        """Remember a site's hosts as callers that may be back."""
        for its in self.callers.values():
            its.discard(name)
        for host in hosts:
            self.callers.setdefault(host, set()).add(name)
        self.callers = {host: names for host, names in self.callers.items() if names}

    # -- changes and the end

    def reconfigure(self, cfg: Config) -> None:
        self.cfg = self.alerts.cfg = cfg
        changed = self.scheduler.reconfigure(cfg, self.now)
        for site in changed:
            self.memory.forget(site.name)
        self._part(changed, False)
        self.has_misplaced = True       # perhaps
        self.load()

    def _place_anew(self) -> None:
        """Mail of our own whose way has changed is read again, and finds its new place; what is being sent, after that."""
        sites = [site for site in self.scheduler.sites.values() if self.scheduler.is_misplaced(site)]
        pairs = [(site, id) for site in sites for id, entry in site.entries.items() if entry.state is not State.DELIVERING]
        for site, id in pairs:
            self.scheduler.drop(site, id)
        self.has_misplaced = any(site.entries for site in sites)
        if pairs:
            self.load()

    def stop(self) -> None:
        """No new connections; those open end after the message they are at."""
        self.is_stopping = True
        for courier in self.couriers:
            courier.leave()
        for id in list(self.waiting):
            self._let_go(id)

    def cut(self) -> None:
        for line in [*self.couriers, *self.inquirers]:
            line.cut()


# == 13. CONTROL ===============================================================
# What others may ask of the queue: ETRN from the network, commands from the
# control socket.  A command is a generator of JSON objects; None in between
# means "nothing to say now, come back later"; the last one has "exit".

def answer_etrn(manager: Manager, what: str, address: str, name: str, username: str = "") -> Reply:
    """RFC 1985 5.3, with the replies of our manual: one line, never 251.
    `username`: of a client that authenticated."""
    scheduler = manager.scheduler
    sites = [site for site in scheduler.matching(what) if not site.cfg.is_notices]
    count = sum(len(site.entries) - site.count[State.HOLD] for site in sites)
    if not scheduler.serves(what):
        reply = Reply(459, "4.7.1", "Node %s not allowed: not served here" % what)
    elif not may_etrn(scheduler, what, address, username):
        reply = Reply(459, "4.7.1", "Node %s not allowed: not %s" % (
            what, "for you to ask for" if username else "from your address"))
    elif manager.load_error or (sites and all(site.is_held for site in sites)):
        reply = Reply(458, "4.0.0", "Unable to queue messages for node %s" % what)
    else:
        if username:
            manager.move(what, address)
        fresh = manager.flush(what)
        if count and fresh and (username or manager.may_know(address, sites)):
            reply = Reply(253, "2.0.0", "OK, %d pending messages for node %s started" % (count, what))
        else:
            reply = Reply(250, "2.0.0", "OK, queuing for node %s started" % what)
    manager.log.write("flush", "etrn: site=%s, client=%s, messages=%d, reply=%d" % (
        what, format_peer(address, name), count, reply.code))
    return reply


def may_etrn(scheduler: Scheduler, what: str, address: str, username: str = "") -> bool:
    """Whether this client may ask; `@name` is as the strictest of the domains it
    means.  Networks in `etrn` are for those who come without credentials: who has them may
    come from anywhere, but for nobody's domains but its own."""
    cfgs = scheduler.meant(what)
    if username:
        return all(cfg.username == username and cfg.etrn != "none" for cfg in cfgs)
    return all(cfg.etrn == "any" or (not isinstance(cfg.etrn, str) and is_within(address, cfg.etrn)) for cfg in cfgs)


def answer_atrn(manager: Manager, username: str, domains: Sequence[str], address: str, name: str,
                has_tls: bool) -> Tuple[Reply, List[Site]]:
    """RFC 2645 5.2.1: the reply, and with a 250 the sites whose mail goes over the client's connection."""
    sites: List[Site] = []
    count = 0
    if not all(manager.cfg.is_owned(domain, username) for domain in domains):
        reply = Reply(450, "4.7.1", "ATRN request refused: not a domain of yours")
    else:
        all_sites = manager.scheduler.collected_by(username, domains, manager.now)
        sites = [site for site in all_sites if site.count[State.ACTIVE] + site.count[State.DEFERRED]]
        count = sum(site.count[State.ACTIVE] + site.count[State.DEFERRED] for site in sites)
        problem = find_obstacle(manager, all_sites)
        if not has_tls and any(site.cfg.tls not in ("none", "may") for site in all_sites):
            reply = Reply(530, "5.7.0", "Must issue a STARTTLS command first")      # what the tls option asks, RFC 3207 4
        elif problem:
            manager.cut_silent(all_sites)       # for the next time
            reply = Reply(451, "4.3.0", "Unable to process ATRN request now: %s" % problem)
        elif not sites:
            reply = Reply(453, "4.0.0", "You have no mail")
        else:
            reply = Reply(250, "2.0.0", "OK now reversing the connection")
    manager.log.write("flush", "atrn: site=%s, client=%s, messages=%d, reply=%d" % (
        ",".join(domains or [site.name for site in sites]), format_peer(address, name), count, reply.code))
    return reply, sites


def find_obstacle(manager: Manager, sites: Sequence[Site]) -> str:
    """Why mail cannot be collected now; empty when it can."""
    if manager.is_loading or manager.load_error:
        return "the spool is being read"
    if any(site.is_collecting for site in sites):
        return "somebody else is collecting it"
    if not any(site.count[State.ACTIVE] + site.count[State.DEFERRED] for site in sites):
        if any(site.is_held and site.entries for site in sites):
            return "the queue is held"
        if any(site.count[State.DELIVERING] for site in sites):
            return "it is being delivered"
    return "too many connections" if len(manager.couriers) >= LINES_MAX or manager.is_stopping else ""


Answers = Iterator[Optional[Dict[str, Any]]]


def collect_status(manager: Manager, connections: int, started: Optional[float]) -> Dict[str, Any]:
    """`started`: monotonic, None where no relay runs."""
    scheduler, now = manager.scheduler, manager.now
    messages, octets, held = scheduler.messages()
    domains = {}
    for name in [name for name in manager.cfg.domains if name[0] != "."]:
        scheduler.site(name, now)
    for site in sorted(scheduler.sites.values(), key=lambda site: site.name):
        if site.cfg.is_notices and not site.entries:
            continue
        probing = bool(site.entries) and site.state is not Primary.UP and not site.waits_for
        domains[site.name] = dict(
            primary=site.state.value, since=site.since, queued=len(site.entries), bytes=site.octets, oldest=site.oldest(),
            last_error=site.trouble, next_probe=to_wall(site.next_probe, now) if probing else None,
            held=site.is_held, address=site.home or None, **site.counters)
    return {"version": __version__, "pid": os.getpid() if started is not None else None,
            "uptime": round(now.mono - started, 3) if started is not None else None, "connections": connections,
            "spool": {"messages": messages, "bytes": octets, "free": manager.free_space(), "held": held,
                      "corrupt": manager.spool.corrupt_count, "sick": manager.spool.sick or None,
                      "loading": manager.is_loading},
            "domains": domains}


def to_wall(mono: float, now: Now) -> Time:
    return round(now.wall + mono - now.mono, 3)


def run_command(manager: Manager, request: Mapping[str, Any], connections: int = 0, started: Optional[float] = None) -> Answers:
    """Any request of the control socket.  What is wrong with it is said in an answer."""
    command, what = str(request.get("command")), str(request.get("what", "all"))
    if command == "flush" and manager.is_loading:
        manager.early.add(what)         # what is read only later goes, too
    while manager.is_loading and (started is None or command not in ("status", "flush")):
        yield None                      # what is asked about may not have been read yet
    if command == "status":
        yield dict(collect_status(manager, connections, started), exit=EX_OK)
    elif command not in ("list", "flush", "hold", "release", "delete", "bounce"):
        yield {"error": "unknown command", "exit": EX_USAGE}
    elif what != "all" and not manager.scheduler.holding(what) and not (
            manager.scheduler.serves(what) or manager.scheduler.matching(what)):
        yield {"error": "%s: no such domain or message here" % printable(what, 100), "exit": EX_MISSING}
    elif command == "list":
        yield from list_entries(manager, what)
    elif command == "flush":
        yield from flush_and_watch(manager, what, bool(request.get("wait", True)))
    elif command in ("hold", "release"):
        yield from change_hold(manager, what, command == "hold")
    else:
        yield from end_entries(manager, what, command)


def list_entries(manager: Manager, what: str) -> Answers:
    """The part of the queue's state that is not in the sidecars, in slices."""
    scheduler = manager.scheduler
    for site in scheduler.holding(what) or scheduler.matching(what):
        entries = [site.entries[what]] if what in site.entries else list(site.entries.values())
        for start in range(0, len(entries), LOAD_BATCH):
            rows = []
            for entry in entries[start:start + LOAD_BATCH]:
                if site.entries.get(entry.id) is not entry:
                    continue
                due: Optional[float] = manager.now.mono
                state = "queued"
                if entry.state is State.HOLD:
                    due, state = None, "held"
                elif entry.state is State.DELIVERING:
                    state = "delivering"
                elif site.waits_for:
                    due = None
                elif entry.state is State.DEFERRED:
                    due = max(entry.due, site.next_probe if site.state is Primary.DOWN else 0.0)
                elif site.state is Primary.DOWN:
                    due = site.next_probe
                rows.append([entry.id, state, due if due is None else to_wall(due, manager.now), entry.expires,
                             site.failures - entry.base])
            yield {"site": site.name, "notices": site.cfg.is_notices,
                   "error": site.trouble if site.state is Primary.DOWN or site.waits_for else "", "rows": rows}
    yield {"exit": EX_OK}


def flush_and_watch(manager: Manager, what: str, wait: bool) -> Answers:
    """Deliver now.  With `wait` until each message queued at the start has left or failed once."""
    sites = manager.scheduler.matching(what) or manager.scheduler.holding(what)
    if sites and all(site.is_held for site in sites):
        yield {"error": "the queue for %s is held" % what, "exit": EX_TEMPFAIL}
        return
    held = sum(site.count[State.HOLD] for site in sites)
    watch = manager.watch((site.name, entry.id) for site in sites for entry in site.entries.values()
                          if entry.state is not State.HOLD)
    try:
        manager.heal(sites)
        manager.flush_sites(sites)
        manager.log.write("flush", "command: site=%s, messages=%d" % (what, watch.total))
        last, look = -1, manager.now.mono + FLUSH_LOOK_S
        while wait and watch.left:
            if manager.now.mono >= look:
                look = manager.now.mono + FLUSH_LOOK_S
                manager.settle_idle(watch)
            if len(watch.left) != last:
                last = len(watch.left)
                yield {"total": watch.total, "left": last}
            yield None
    finally:
        manager.watches.remove(watch)
    counts = watch.counts
    waiting = counts["deferred"] + len(watch.left)
    down = watch.error and any(site.state is Primary.DOWN for site in sites)
    yield dict(counts, queued=watch.total, waiting=waiting, held=held, reason=watch.error,
               exit=EX_OK if not waiting or not wait else EX_UNAVAILABLE if down else EX_TEMPFAIL)


def change_hold(manager: Manager, what: str, on: bool) -> Answers:
    done: List[Any] = []
    count = manager.hold(what, on, done.append)
    while not done:
        yield None
    if isinstance(done[0], Exception):
        yield {"error": "cannot be recorded: %s" % printable(str(done[0])), "exit": EX_TEMPFAIL}
    else:
        manager.log.write("qmgr", "%s: %s by command, %d messages" % (what, "held" if on else "released", count))
        yield {"count": count, "exit": EX_OK}


def end_entries(manager: Manager, what: str, command: str) -> Answers:
    """--delete and --bounce.  What is being sent at this moment is left alone and counted."""
    sites = manager.scheduler.holding(what)
    pairs = [(site, site.entries[what]) for site in sites] if sites else [
        (site, entry) for site in manager.scheduler.matching(what) for entry in list(site.entries.values())]
    watch = manager.watch(((site.name, entry.id) for site, entry in pairs), needs_primary=False)
    count = busy = 0
    try:
        for number, (site, entry) in enumerate(pairs, 1):
            if number % END_BATCH == 0:
                yield None              # others wait for the loop, too
            if site.entries.get(entry.id) is not entry or entry.state is State.DELIVERING:
                busy += entry.id in site.entries
                watch.left.discard((site.name, entry.id))
                continue
            count += 1
            manager.log.write("qmgr", "%s: %s by command" % (entry.id, "deleted" if command == "delete" else "bounced"))
            if command == "delete":
                manager.end(site, entry, DELETED)
            else:
                manager.end(site, entry, BOUNCED, "5.0.0", "Returned by the postmaster of the backup mail server")
        while watch.left:
            yield None
    finally:
        manager.watches.remove(watch)
    late = watch.counts["deferred"]     # the disk is full, or worse
    yield {"count": count - late, "busy": busy + late, "exit": EX_TEMPFAIL if busy + late else EX_OK}


# == 14. STATUS ================================================================
# Values in, text for people and for machines out: terminal, page, metrics.  Pure.
# Foreign text goes through printable() everywhere, and on the page through escape().

class Style(NamedTuple):
    """What the output may be: so many columns wide (0: any), in colour or not."""
    width: int = 0
    is_coloured: bool = False

    def paint(self, text: str, colour: str) -> str:
        return "\033[%sm%s\033[0m" % (colour, text) if self.is_coloured and colour else text


PLAIN = Style()
BOLD, DIM, RED, GREEN, YELLOW = "1", "2", "31", "32", "33"
STATE_COLOURS = {"up": GREEN, "down": RED, "rejecting": YELLOW, "held": YELLOW, "delivering": GREEN}
CELL_MIN = 12                   # columns a cell keeps when the terminal is narrow
Row = Sequence[str]


def clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[:max(0, width - 2)] + ".."


def table_width(widths: Sequence[int]) -> int:
    return sum(widths) + 2 * (len(widths) - 1)


def format_table(rows: Sequence[Row], right: Sequence[int] = (), style: Style = PLAIN, shrink: Sequence[int] = (),
                 drop: Sequence[int] = (), colours: Callable[[Row, int], str] = lambda row, column: "") -> str:
    """Columns padded to their widest cell; those in `right` are flush right.
    On a terminal too narrow for it those in `shrink` give way, down to
    CELL_MIN, then those in `drop` are left out one after the other."""
    widths = {column: max(map(len, cells)) for column, cells in enumerate(zip(*rows))}
    natural = dict(widths)
    least = {column: min(width, CELL_MIN) if column in shrink else width for column, width in widths.items()}
    for column in drop if style.width else ():
        if table_width(list(least.values())) > style.width:
            del widths[column], least[column]
    while style.width and table_width(list(widths.values())) > style.width:
        wide = [column for column in widths if widths[column] > least[column]]
        if not wide:
            break
        widths[max(wide, key=lambda column: widths[column])] -= 1
    if not style.is_coloured:
        form = "  ".join("%%%s%ds" % ("" if column in right else "-", width) for column, width in widths.items())
        columns = [[clip(row[column], width) for row in rows] if width < natural[column] else [row[column] for row in rows]
                   for column, width in widths.items()]
        return "".join((form % cells).rstrip() + "\n" for cells in zip(*columns))
    lines = []
    for number, row in enumerate(rows):
        cells = []
        for column, width in widths.items():
            cell = clip(row[column], width)
            pad = " " * (width - len(cell))
            cell = style.paint(cell, BOLD if number == 0 else colours(row, column))
            cells.append(pad + cell if column in right else cell + pad)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines) + "\n"


def say_count(number: int, one: str = "message") -> str:
    return "%s %s%s" % (format(number, ","), one, "" if number == 1 else "s")


def say_next(at: Optional[Time], now: Time) -> str:
    return "-" if at is None else "in " + format_duration(at - now) if at > now else "now"


STATUS_KEYS = ("version", "pid", "uptime", "connections")
SPOOL_KEYS = ("messages", "bytes", "free", "held", "corrupt")
DOMAIN_KEYS = ("primary", "since", "queued", "bytes", "oldest", "accepted", "delivered", "bounced", "deferred", "expired",
               "last_error", "next_probe")


def public_status(status: Mapping[str, Any]) -> Dict[str, Any]:
    """--status --json and /status.json: what was promised to scripts, without what only our own pages show."""
    out: Dict[str, Any] = {key: status[key] for key in STATUS_KEYS}
    out["spool"] = {key: status["spool"][key] for key in SPOOL_KEYS}
    out["domains"] = {name: {key: one[key] for key in DOMAIN_KEYS}
                      for name, one in status["domains"].items() if is_domain(name)}
    return out


def format_status(status: Mapping[str, Any], now: Time, style: Style = PLAIN) -> str:
    spool = status["spool"]
    head = style.paint("etrn_relay %s" % status["version"], BOLD)
    if status["pid"] is None:
        out = ["%s: %s" % (head, style.paint("not running", YELLOW))]
    else:
        out = ["%s: running for %s, process %d, %s" % (
            head, format_duration(status["uptime"]), status["pid"], say_count(status["connections"], "connection"))]
    out.append("spool: %s, %s, %d held, %s, %s free%s%s" % (
        say_count(spool["messages"]), format_size(spool["bytes"]), spool["held"],
        style.paint("%d corrupt" % spool["corrupt"], RED if spool["corrupt"] else ""), format_size(spool["free"]),
        style.paint("; SICK: %s" % printable(spool["sick"]), RED) if spool["sick"] else "",
        "; still being read" if spool["loading"] else ""))
    rows: List[Row] = [("DOMAIN", "PRIMARY", "SINCE", "QUEUED", "SIZE", "OLDEST", "NEXT TRY", "ACCEPTED", "DELIVERED",
                        "BOUNCED", "EXPIRED")]
    errors = []
    for site, one in status["domains"].items():
        name = say_site(site)
        rows.append((
            name, one["primary"] + (" (held)" if one["held"] else ""), format_duration(now - one["since"]),
            str(one["queued"]), format_size(one["bytes"]), format_duration(now - one["oldest"]) if one["oldest"] else "-",
            say_next(one["next_probe"], now),
            str(one["accepted"]), str(one["delivered"]), str(one["bounced"]), str(one["expired"])))
        if one.get("address"):
            errors += _hang("%s: at %s since an authenticated ETRN" % (name, printable(one["address"])), style)
        if one["last_error"]:
            errors += _hang("%s: %s" % (name, printable(one["last_error"])), style)
    text = "\n".join(out) + "\n"
    if len(rows) > 1:
        text += "\n" + format_table(rows, (3, 4, 7, 8, 9, 10), style, (0,), (7, 10, 9, 8, 4, 5, 6),
                                    lambda row, column: STATE_COLOURS.get(row[1].split()[0], DIM) if column == 1 else "")
    return text + ("\n" + "\n".join(errors) + "\n" if errors else "")


def say_site(name: str) -> str:
    """A domain, or whose mail of ours a site that is none carries."""
    kind, _, domain = printable(name).partition(":")
    return kind if is_domain(name) else "%ss to %s" % (kind, domain) if domain else "our %ss" % kind


def _hang(text: str, style: Style, indent: int = 4) -> List[str]:
    """A long line, broken where the terminal ends."""
    if not style.width or len(text) <= style.width:
        return [text]
    return textwrap.wrap(text, max(CELL_MIN, style.width), subsequent_indent=" " * indent, break_on_hyphens=False)


def format_queue(rows: Sequence[Mapping[str, Any]], now: Time, style: Style = PLAIN) -> str:
    """The list of contract --queue --json, for people, and its sums for each domain."""
    if not rows:
        return "The queue is empty.\n"
    out: List[Row] = [("ID", "AGE", "SIZE", "STATE", "NEXT TRY", "SENDER", "RECIPIENTS")]
    for row in rows:
        people = [printable(one["address"], 60) for one in row["recipients"][:3]]
        if len(row["recipients"]) > 3:
            people.append("and %d more" % (len(row["recipients"]) - 3))
        due = None if row["state"] == "delivering" else row["next_attempt"]
        out.append((row["id"], format_duration(now - row["received"]), format_size(row["size"]), row["state"],
                    say_next(due, now), "<%s>" % printable(row["sender"], 60), ", ".join(people)))
    text = format_table(out, (1, 2), style, (5, 6), (2, 4, 3),
                        lambda row, column: STATE_COLOURS.get(row[3], "") if column == 3 else "")
    return text + "\n" + format_sums(rows, now, style)


def format_sums(rows: Sequence[Mapping[str, Any]], now: Time, style: Style) -> str:
    """A line a domain: how much waits, since when, and until when; then why."""
    domains: Dict[str, List[Mapping[str, Any]]] = {}
    for row in rows:
        domains.setdefault(row["domain"], []).append(row)
    out: List[Row] = [("DOMAIN", "MESSAGES", "SIZE", "HELD", "OLDEST", "NEXT TRY")]
    reasons = []
    for name, its in [*domains.items(), *([("all", rows)] if len(domains) > 1 else [])]:
        octets, states, ages, times = (list(map(operator.itemgetter(key), its)) for key in (
            "size", "state", "received", "next_attempt"))
        due = min((at for at in set(times) if at is not None), default=None)
        out.append((name, format(len(its), ","), format_size(sum(octets)), str(states.count("held")),
                    format_duration(now - min(ages)), say_next(due, now)))
        last = next((one["last_response"] for row in its for one in row["recipients"] if one["last_response"]), "")
        if last and name in domains:
            reasons += _hang("%s: %s" % (name, printable(last)), style)
    text = format_table(out, (1, 2, 3, 4), style, (0,), (3, 2, 4))
    return text + ("\n" + "\n".join(reasons) + "\n" if reasons else "")


def format_envelope(sidecar: Mapping[str, Any], header: bytes, now: Time, style: Style = PLAIN) -> str:
    """What --show says of one message."""
    client = sidecar["client"]
    out: List[str] = []

    def say(label: str, text: str, colour: str = "") -> None:
        first, *rest = _hang(text, style._replace(width=max(0, style.width - 13)), 0)
        out.append("%s %s" % (style.paint(label, BOLD) + " " * (12 - len(label)), style.paint(first, colour)))
        out.extend(" " * 13 + style.paint(line, colour) for line in rest)
    say("ID", sidecar["id"])
    say("received", "%s, %s ago" % (email.utils.formatdate(sidecar["received"], localtime=True),
                                    format_duration(now - sidecar["received"])))
    say("client", "%s%s%s" % (printable(client["address"] or "none (made here)"),
                              ", HELO " + printable(client["helo"]) if client["helo"] else "",
                              ", " + client["tls"] if client["tls"] else ""))
    say("size", say_count(sidecar["size"], "octet"))
    say("SHA-256", sidecar["sha256"])
    say("sender", "<%s>" % printable(sidecar["sender"]))
    if sidecar["held"]:
        say("held for", ", ".join(sidecar["held"]), YELLOW)
    for one in sidecar["recipients"]:
        waits = one["state"] == QUEUED
        say("recipient", "<%s>: %s, %s" % (printable(one["address"]), one["state"], say_count(one["attempts"], "attempt")))
        if one["last_attempt"]:
            say("", "last %s ago: %s" % (format_duration(now - one["last_attempt"]), printable(one["last_response"])), YELLOW)
        elif one["last_response"]:
            say("", printable(one["last_response"]), YELLOW)
        if waits:
            say("", "%sexpires %s, %s" % (
                "next try %s, " % say_next(one["next_attempt"], now) if one["next_attempt"] > now else "",
                say_next(one["expires"], now), email.utils.formatdate(one["expires"], localtime=True)))
    lines = header.decode("utf-8", "replace").split("\r\n")
    return "\n".join(out) + "\n\n" + "\n".join(printable(line.expandtabs(), 2000) for line in lines)


def format_progress(total: int, left: int, width: int = 40) -> str:
    done = (total - left) * width // total if total else width
    return "[%s%s] %d of %d" % ("#" * done, "." * (width - done), total - left, total)


def format_mbox(sidecar: Mapping[str, Any], message: bytes, is_meant: Callable[[str], bool]) -> bytes:
    """One message as mboxrd: LF line ends, From_ lines quoted reversibly.  The
    envelope goes in front of the header; of the recipients those whose domain is meant."""
    date = time.strftime("%a %b %e %H:%M:%S %Y", time.gmtime(sidecar["received"]))
    sender = re.sub(r"[^!-~]", "_", sidecar["sender"]) or "MAILER-DAEMON"     # readers know only ASCII here
    head = ["From %s %s" % (sender, date), "X-Envelope-From: <%s>" % sidecar["sender"]]
    head += ["X-Envelope-To: <%s>" % one["address"] for one in sidecar["recipients"]
             if one["state"] == QUEUED and is_meant(one["domain"])]
    body = re.sub(rb"^(>*From )", rb">\1", message.replace(b"\r\n", b"\n"), flags=re.M)
    return "\n".join(head).encode("utf-8") + b"\n" + body + (b"\n" if body.endswith(b"\n") else b"\n\n")


# -- what is remembered for the page

class Histogram:
    """Counts of what was not above each bound, as Prometheus wants them; since the start."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        value = max(0.0, value)         # a clock that was set back
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    def values(self) -> "Observed":
        return Observed(self.bounds, tuple(self.counts), self.sum)


class Observed(NamedTuple):
    bounds: Tuple[float, ...]
    counts: Tuple[int, ...]         # one more: what was above all bounds
    sum: float


class Event(NamedTuple):
    time: Time
    service: str
    level: str
    text: str
    times: int = 1                  # the same again and again is one event


class Trace(NamedTuple):
    """What one domain's lines are drawn from; both lists hold changes only and
    go forward in time.  A queue that stays as it is adds nothing."""
    depth: List[Tuple[Time, int, int]]      # (begin of the bucket, peak in it, depth at its end)
    states: List[Tuple[Time, str]]          # (since, the primary's state, or OFF)

    def last_change(self) -> Time:
        return max(self.depth[-1][0] if self.depth else 0.0, self.states[-1][0] if self.states else 0.0)


OFF = "off"                         # as a primary's state: this relay was not running
WINDOWS = (("24 hours", 86400.0, HISTORY_BUCKET_S), ("7 days", WEEK_S, HISTORY_COARSE_S))


class History:
    """A week of queue depths and states, and the last events; bounded in every direction."""

    def __init__(self) -> None:
        self.traces: Dict[str, Trace] = {}
        self.events: Dict[str, Deque[Event]] = {}       # a deque a service: one cannot crowd out another
        self.is_dirty = False

    def note(self, name: str, depth: int, state: str, now: Time) -> None:
        trace = self.traces.get(name)
        if trace is None:
            if len(self.traces) >= HISTORY_SITES_MAX:
                return                  # the configured ones come first
            trace = self.traces[name] = Trace([], [])
        bucket = now - now % HISTORY_BUCKET_S
        while (trace.depth and trace.depth[-1][0] > bucket) or (trace.states and trace.states[-1][0] > now):
            self._back(trace, bucket, now)
        if not trace.states or trace.states[-1][1] != state:
            trace.states.append((now, state))
            del trace.states[:-HISTORY_STATES_MAX]
            self.is_dirty = True
        at, peak, last = trace.depth[-1] if trace.depth else (-INF, depth, -1)
        if depth == last:
            return
        if at == bucket:
            trace.depth[-1] = (at, max(peak, depth), depth)
        else:
            trace.depth.append((bucket, max(last, depth), depth))
            if len(trace.depth) > 2 * (WEEK_S // HISTORY_COARSE_S + 86400.0 // HISTORY_BUCKET_S):
                self._thin(trace, now)
        self.is_dirty = True

    @staticmethod
    def _back(trace: Trace, bucket: Time, now: Time) -> None:
        """The clock was set back: what is of the future is not true."""
        if trace.depth and trace.depth[-1][0] > bucket:
            trace.depth.pop()
        if trace.states and trace.states[-1][0] > now:
            trace.states.pop()

    @staticmethod
    def _thin(trace: Trace, now: Time) -> None:
        """Older than a day: an hour's changes are one.  Older than a week: only what the week began with."""
        out: List[Tuple[Time, int, int]] = []
        for at, peak, last in trace.depth:
            if out and (at < now - WEEK_S or (
                    at < now - 86400.0 and at // HISTORY_COARSE_S == out[-1][0] // HISTORY_COARSE_S)):
                before = out.pop()
                peak = last if at < now - WEEK_S else max(peak, before[1])
            out.append((at, peak, last))
        trace.depth[:] = out
        while len(trace.states) > 1 and trace.states[1][0] < now - WEEK_S:
            del trace.states[0]

    def tell(self, service: str, text: str, level: str, now: Time) -> None:
        """What the log says of more than one message: states, flushes, and all that is wrong."""
        if level == "debug" or (level == "info" and service not in ("primary", "flush", "master")):
            return
        events = self.events.setdefault(service, collections.deque(maxlen=EVENTS_MAX))
        text = text[:EVENT_TEXT_MAX]
        times = events.pop().times + 1 if events and (events[-1].text, events[-1].level) == (text, level) else 1
        events.append(Event(now, service, level, text, times))
        self.is_dirty = self.is_dirty or service != "flush"     # who polls with ETRN must not wear out the flash

    def latest(self) -> Tuple[Event, ...]:
        return tuple(sorted((event for events in self.events.values() for event in events), reverse=True))

    def copy(self, name: str) -> Trace:
        trace = self.traces.get(name)
        return Trace(list(trace.depth), list(trace.states)) if trace else Trace([], [])

    def to_values(self, live: Iterable[str], now: Time) -> Dict[str, Any]:
        """`live`: domains that still are ours."""
        self.is_dirty = False
        live = set(live)
        for name, trace in list(self.traces.items()):
            self._thin(trace, now)
            if name not in live and trace.last_change() < now - WEEK_S:
                del self.traces[name]
        return {"format": 1, "saved": now,
                "sites": {name: {"depth": [list(one) for one in trace.depth], "states": [list(one) for one in trace.states]}
                          for name, trace in self.traces.items()},
                "events": [list(event) for event in reversed(self.latest())]}

    def from_values(self, values: Mapping[str, Any], now: Time) -> None:
        """What was kept before the restart.  What does not make sense is forgotten."""
        sites, events = values.get("sites"), values.get("events")
        for name, one in list(sites.items())[:HISTORY_SITES_MAX] if isinstance(sites, dict) else ():
            try:
                trace = Trace([(float(at), int(peak), int(last)) for at, peak, last in one["depth"]],
                              [(float(at), str(state)) for at, state in one["states"]])
            except (TypeError, ValueError, KeyError, OverflowError):
                continue
            if is_forward([at for at, _, _ in trace.depth], now) and is_forward([at for at, _ in trace.states], now):
                del trace.states[:-HISTORY_STATES_MAX]
                self._thin(trace, now)
                del trace.depth[:-HISTORY_STATES_MAX]
                self.traces[name] = trace
        for item in events if isinstance(events, list) else ():
            try:
                at, service, level, text, times = item
                event = Event(float(at), printable(str(service), 20), str(level), str(text)[:EVENT_TEXT_MAX], int(times))
            except (TypeError, ValueError, OverflowError):
                continue
            if event.time <= now and len(self.events) < EVENTS_MAX:
                self.events.setdefault(event.service, collections.deque(maxlen=EVENTS_MAX)).append(event)


def is_forward(times: Sequence[Time], end: Time) -> bool:
    """Whether they follow each other and end before `end`; not so with NaN in them."""
    return all(one <= other for one, other in zip([0.0, *times], [*times, end]))


def resample(depth: Sequence[Tuple[Time, int, int]], start: Time, step: float, count: int) -> List[Optional[int]]:
    """The peak in each of `count` columns of `step` seconds; None before anything is known."""
    out: List[Optional[int]] = []
    known: Optional[int] = None
    at = 0
    for column in range(count):
        peak = known
        while at < len(depth) and depth[at][0] < start + (column + 1) * step:
            begin, top, known = depth[at]
            if begin < start:           # before all columns: only what it left counts
                peak = known
            elif peak is None or top > peak:
                peak = top
            at += 1
        out.append(peak)
    return out


WORSE = ("", OFF, "unknown", "up", "rejecting", "down")      # a column shows the last of these that it saw


def resample_states(states: Sequence[Tuple[Time, str]], start: Time, step: float, count: int) -> List[str]:
    """The worst state in each column, so that a short outage is not lost between two."""
    out = [""] * count
    for number, (since, state) in enumerate(states):
        until = states[number + 1][0] if number + 1 < len(states) else start + count * step
        first, last = int((since - start) // step), -int(-(until - start) // step)
        for column in range(max(0, first), min(count, max(last, first + 1))):
            if state in WORSE and WORSE.index(state) > WORSE.index(out[column]):
                out[column] = state
    return out


def seconds_in(states: Sequence[Tuple[Time, str]], start: Time, end: Time) -> Dict[str, float]:
    """How long it was in each state."""
    out: Dict[str, float] = {}
    for number, (since, state) in enumerate(states):
        until = states[number + 1][0] if number + 1 < len(states) else end
        out[state] = out.get(state, 0.0) + max(0.0, min(until, end) - max(since, start))
    return out


# -- values the loop hands over, and what machines read

class Snapshot(NamedTuple):
    """Everything there is to show, at one moment.  Nobody changes it."""
    now: Now
    hostname: str
    status: Mapping[str, Any]           # as of collect_status()
    started: Time                       # by the wall clock of that time
    min_free: int
    unreadable: str                     # why the spool could not be read whole, or empty
    certificate: Tuple[Time, Time]      # begin and end; zeros for none
    traces: Mapping[str, Trace]
    events: Tuple[Event, ...]           # latest first
    acceptance: Observed
    queue_time: Observed


def find_ills(snapshot: Snapshot) -> List[str]:
    """What is wrong with the relay itself, for /healthz.  A primary that is down is
    what we are here for, and no reason to restart us."""
    spool = snapshot.status["spool"]
    out = []
    if spool["sick"]:
        out.append("spool sick: %s; new mail gets 451" % printable(str(spool["sick"])))
    if snapshot.unreadable:
        out.append("spool unreadable: %s" % printable(snapshot.unreadable))
    if spool["free"] < snapshot.min_free:
        out.append("disk short: %s free, below min_free_space %s; new mail gets 452" % (
            format_size(spool["free"]), format_size(snapshot.min_free)))
    return out


def is_domain(name: str) -> bool:
    """Not a site of our own notices and alerts."""
    return not name.startswith((NOTICES, ALERTS))


Sample = Tuple[str, Mapping[str, str], float]       # suffix of the name, labels, value
Family = Tuple[str, str, str, List[Sample]]         # name, type, help


def format_metrics(snapshot: Snapshot) -> str:
    """Prometheus text format 0.0.4; base units, counters end in _total."""
    out = []
    for name, kind, text, samples in collect_metrics(snapshot):
        out.append("# HELP etrn_relay_%s %s" % (name, text))
        out.append("# TYPE etrn_relay_%s %s" % (name, kind))
        for suffix, labels, value in samples:
            inner = ",".join('%s="%s"' % (key, escape_label(one)) for key, one in labels.items())
            out.append("etrn_relay_%s%s%s %s" % (name, suffix, "{%s}" % inner if inner else "", format_number(value)))
    return "\n".join(out) + "\n"


def escape_label(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r'\"').replace("\n", r"\n")


def format_number(value: float) -> str:
    if value == INF:
        return "+Inf"
    return "%d" % value if value == int(value) else repr(float(value))


def collect_metrics(snapshot: Snapshot) -> List[Family]:
    status, spool = snapshot.status, snapshot.status["spool"]
    domains = {name: one for name, one in status["domains"].items() if is_domain(name)}
    own = [one for name, one in status["domains"].items() if not is_domain(name)]

    def single(name: str, text: str, value: float, kind: str = "gauge") -> Family:
        return name, kind, text, [("", {}, value)]

    def each(name: str, text: str, key: str, kind: str = "gauge") -> Family:
        return name, kind, text, [("", {"domain": domain}, one[key]) for domain, one in domains.items() if one[key] is not None]
    out: List[Family] = [
        ("info", "gauge", "Version of the relay; always 1.", [("", {"version": status["version"]}, 1)]),
        single("start_time_seconds", "When the relay started, Unix time.", snapshot.started),
        single("healthy", "1 when /healthz answers 200.", not find_ills(snapshot)),
        single("connections", "SMTP clients connected now.", status["connections"]),
        single("spool_messages", "Messages in the spool.", spool["messages"]),
        single("spool_bytes", "Octets of these messages.", spool["bytes"]),
        single("spool_free_bytes", "Octets the spool's file system can still take.", spool["free"]),
        single("spool_held_messages", "Messages held by an operator.", spool["held"]),
        single("spool_corrupt_messages", "Messages set aside in corrupt/.", spool["corrupt"]),
        single("spool_sick", "1 while the spool's disk fails and no new mail is taken.", bool(spool["sick"])),
        single("spool_loading", "1 while the spool is being read after a start.", bool(spool["loading"])),
        single("notices_queued", "Notices and alerts of our own that wait.", sum(one["queued"] for one in own)),
        ("primary_state", "gauge", "1 for the state the primary is in.",
         [("", {"domain": domain, "state": state.value}, one["primary"] == state.value)
          for domain, one in domains.items() for state in Primary]),
        each("primary_state_since_timestamp_seconds", "When the primary came into its state, Unix time.", "since"),
        each("primary_next_probe_timestamp_seconds", "When a primary that mail waits for is tried next, Unix time.",
             "next_probe"),
        each("queue_messages", "Messages waiting for the primary.", "queued"),
        each("queue_bytes", "Octets of these messages.", "bytes"),
        each("queue_oldest_timestamp_seconds", "When the oldest of these messages came, Unix time.", "oldest"),
        each("queue_held", "1 while the whole domain is held.", "held"),
        each("messages_accepted_total", "Messages taken for the domain.", "accepted", "counter"),
        each("messages_delivered_total", "Deliveries the primary took.", "delivered", "counter"),
        each("messages_bounced_total", "Deliveries refused for good.", "bounced", "counter"),
        each("messages_deferred_total", "Deliveries put off.", "deferred", "counter"),
        each("messages_expired_total", "Deliveries given up because of their age.", "expired", "counter"),
        ("acceptance_seconds", "histogram", "Time from the end of a message's data to our 250.", to_samples(snapshot.acceptance)),
        ("queue_time_seconds", "histogram", "Time from our 250 to the primary's.", to_samples(snapshot.queue_time))]
    if snapshot.certificate[1]:
        out.append(single("certificate_expiry_timestamp_seconds", "When the TLS certificate ends, Unix time.",
                          snapshot.certificate[1]))
    return [family for family in out if family[3]]


def to_samples(seen: Observed) -> List[Sample]:
    total = itertools.accumulate(seen.counts)
    out: List[Sample] = [("_bucket", {"le": format_number(bound)}, count) for bound, count in zip((*seen.bounds, INF), total)]
    return [*out, ("_sum", {}, seen.sum), ("_count", {}, sum(seen.counts))]


# -- the page

PAGE_STYLE = """
:root{color-scheme:light dark;--bg:#f4f5f7;--card:#fff;--ink:#1a1e24;--dim:#5d6673;--rule:#e3e6ea;--blue:#2a6fdb;--wash:#2a6fdb22;
--good:#1b8a52;--bad:#cf3a35;--warn:#b46b00;--none:#d4d9df;--good-bg:#e6f4ec;--bad-bg:#fcebea;--warn-bg:#fdf2df}
@media(prefers-color-scheme:dark){:root{--bg:#0e1116;--card:#161b22;--ink:#e6eaf0;--dim:#97a1ae;--rule:#272e38;--blue:#6ea8ff;
--wash:#6ea8ff26;--good:#43c07f;--bad:#ff6f69;--warn:#e5a93b;--none:#323a45;--good-bg:#12261c;--bad-bg:#311716;--warn-bg:#2c2110}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",
Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1120px;margin:0 auto;padding:24px 20px 40px}
h1{font-size:22px;line-height:1.25;margin:0;overflow-wrap:anywhere;letter-spacing:-.01em}
h2{font-size:17px;margin:0;overflow-wrap:anywhere}
p{margin:0}
small,.dim{color:var(--dim);font-size:13px}
b,dd,.n{font-variant-numeric:tabular-nums}
header{display:flex;flex-wrap:wrap;justify-content:space-between;align-items:baseline;gap:2px 16px;margin-bottom:16px}
.banner{border-radius:10px;padding:12px 16px;font-weight:600;border-left:4px solid;overflow-wrap:anywhere}
.banner+.banner{margin-top:8px}
.banner.good{background:var(--good-bg);border-color:var(--good)}
.banner.bad{background:var(--bad-bg);border-color:var(--bad)}
.banner.warn{background:var(--warn-bg);border-color:var(--warn)}
.card{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:18px 20px;margin-top:16px}
dl{display:grid;gap:12px 20px;margin:0}
dt{color:var(--dim);font-size:13px}
dd{margin:0;font-weight:600;overflow-wrap:anywhere}
dd small{font-weight:400;display:block}
.tiles{grid-template-columns:repeat(auto-fit,minmax(118px,1fr))}
.tiles dd{font-size:21px;line-height:1.3;letter-spacing:-.01em}
.title{display:flex;flex-wrap:wrap;align-items:center;gap:4px 10px}
.pill{font-size:12px;font-weight:600;line-height:1;border-radius:99px;padding:5px 10px 5px 8px;display:inline-flex;
align-items:center;gap:6px;color:var(--dim);background:var(--bg)}
.pill i{width:8px;height:8px;border-radius:50%;background:currentColor}
.pill.up{color:var(--good);background:var(--good-bg)}
.pill.down{color:var(--bad);background:var(--bad-bg)}
.pill.rejecting,.pill.held{color:var(--warn);background:var(--warn-bg)}
.title .dim{margin-left:auto}
.why{margin-top:6px}
.error{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;margin-top:10px;padding:8px 12px;border-radius:8px;
background:var(--bg);overflow-wrap:anywhere}
.facts{grid-template-columns:repeat(auto-fit,minmax(100px,1fr));margin-top:14px}
.facts dd{line-height:30px}
.facts .big{font-size:26px;letter-spacing:-.02em}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(280px,1fr));gap:16px 28px;margin-top:16px}
figure{margin:0;min-width:0}
figcaption{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 10px;font-size:13px;color:var(--dim);margin-bottom:6px}
figcaption b{color:var(--ink);font-weight:600}
svg{display:block;width:100%;overflow:hidden}
.depth{height:64px;border-bottom:1px solid var(--rule)}
.band{height:10px;margin-top:4px;border-bottom:1px solid var(--rule)}
.area{fill:var(--wash)}
.line{fill:none;stroke:var(--blue);stroke-width:1.75;vector-effect:non-scaling-stroke;stroke-linejoin:round}
.s-,.s-off,.s-unknown{fill:var(--none)}
.s-off{fill-opacity:.5}
.s-{fill-opacity:.35}
.s-up{fill:var(--good);fill-opacity:.75}
.s-down{fill:var(--bad)}
.s-rejecting{fill:var(--warn)}
.axis{display:flex;justify-content:space-between;font-size:11px;color:var(--dim);margin-top:3px}
.counts{margin-top:14px;padding-top:12px;border-top:1px solid var(--rule);display:flex;flex-wrap:wrap;gap:2px 18px}
.counts b{color:var(--ink);font-weight:600}
ol{list-style:none;margin:10px 0 0;padding:0}
li{display:grid;grid-template-columns:124px 64px 1fr;gap:0 10px;padding:7px 0;border-top:1px solid var(--rule);font-size:14px}
li:first-child{border-top:0}
li .text{overflow-wrap:anywhere;min-width:0}
li.warning .text{color:var(--warn)}
li.error .text{color:var(--bad)}
footer{margin-top:20px;display:flex;flex-wrap:wrap;justify-content:space-between;gap:4px 16px}
a{color:var(--blue);text-decoration:none}
a:hover{text-decoration:underline}
@media(max-width:600px){main{padding:16px 12px 32px}.card{padding:15px 14px;border-radius:10px;margin-top:12px}
.tiles{grid-template-columns:1fr 1fr}.tiles div:last-child:nth-child(odd){grid-column:1/-1}
.facts{grid-template-columns:1fr 1fr}.title .dim{margin-left:0;width:100%}
li{grid-template-columns:1fr auto}li .text{grid-column:1/-1}}
"""
PAGE_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="%d"><meta name="color-scheme" content="light dark"><meta name="robots" content="noindex">
<title>%s</title><style>%s</style></head>
<body><main>
"""
PAGE_POLICY = "default-src 'none'; %sbase-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def page_policy() -> str:
    """Content-Security-Policy of the page: its one style sheet, by hash, and nothing else from anywhere."""
    digest = base64.b64encode(hashlib.sha256(PAGE_STYLE.encode("utf-8")).digest()).decode("ascii")
    return PAGE_POLICY % ("style-src 'sha256-%s'; " % digest)


def escape(text: str, longest: int = LOG_TEXT_MAX) -> str:
    """Any text, for HTML and for attributes in double quotes."""
    text = printable(text, longest)
    for character, name in (("&", "amp"), ("<", "lt"), (">", "gt"), ('"', "quot"), ("'", "#39")):
        text = text.replace(character, "&%s;" % name)
    return text


def say_moment(at: Time, now: Time) -> str:
    """Local time: the day only where it is not today."""
    day, here = time.localtime(at), time.localtime(now)
    return time.strftime("%H:%M:%S" if day[:3] == here[:3] else "%a %e %b %H:%M", day)


def format_page(snapshot: Snapshot, now: Time, stalled_s: float = 0.0) -> str:
    """The whole page.  `stalled_s`: the loop has not answered for so long, and the values are that old."""
    status = snapshot.status
    domains = sorted(((name, one) for name, one in status["domains"].items() if is_domain(name)), key=_importance)
    waiting = status["spool"]["messages"]
    out = [PAGE_HEAD % (PAGE_REFRESH_S, "%s%s" % ("(%s) " % format(waiting, ",") if waiting else "", escape(snapshot.hostname)),
                        PAGE_STYLE)]
    out.append('<header><h1>%s</h1><p class="dim">etrn_relay %s, up %s, process %s. %s</p></header>\n' % (
        escape(snapshot.hostname), escape(status["version"]), format_duration(status["uptime"] or 0.0), status["pid"],
        time.strftime("%a %e %b %Y, %H:%M:%S %Z", time.localtime(now))))
    for kind, text in find_news(snapshot, domains, stalled_s):
        out.append('<p class="banner %s">%s</p>\n' % (kind, escape(text)))
    out.append(_tiles(snapshot, now))
    for name, one in domains[:PAGE_DOMAINS_MAX]:
        out.append(_domain(name, one, snapshot.traces.get(name, Trace([], [])), snapshot.now.wall))
    if len(domains) > PAGE_DOMAINS_MAX:
        out.append('<p class="card dim">And %s, with less to tell; --status shows them all.</p>\n' % say_count(
            len(domains) - PAGE_DOMAINS_MAX, "domain"))
    out.append(_events(snapshot.events, now))
    out.append('<footer class="dim"><span>Reloads every %d s; times are local to the relay.</span><span>'
               '<a href="/metrics">metrics</a> &middot; <a href="/status.json">status.json</a> &middot; '
               '<a href="/healthz">healthz</a></span></footer>\n</main></body></html>\n' % PAGE_REFRESH_S)
    return "".join(out)


def _importance(item: Tuple[str, Mapping[str, Any]]) -> Tuple[int, int, str]:
    name, one = item
    order = ("rejecting", "down", "unknown", "up")
    return (order.index(one["primary"]) if one["queued"] else len(order), -one["queued"], name)


def find_news(snapshot: Snapshot, domains: Sequence[Tuple[str, Mapping[str, Any]]], stalled_s: float) -> List[Tuple[str, str]]:
    """What a postmaster must know first: (good, warn or bad; one sentence)."""
    out = [("bad", text[:1].upper() + text[1:] + ".") for text in find_ills(snapshot)]
    if stalled_s:
        out.insert(0, ("bad", "Loop stalled: the relay has not answered for %s; what follows is that old." % (
            format_duration(stalled_s))))
    for state, kind, verb in (("rejecting", "bad", "refuses mail"), ("down", "warn", "is down")):
        names = [name for name, one in domains if one["primary"] == state]
        count = sum(one["queued"] for _, one in domains if one["primary"] == state)
        if names:
            who = "The primary of %s" % names[0] if len(names) == 1 else "%d primaries, that of %s among them," % (
                len(names), names[0])
            verb = verb if len(names) == 1 else verb.replace("refuses", "refuse").replace("is ", "are ")
            out.append((kind if count else "warn", "%s %s; %s." % (who, verb, say_count(count) + (
                " waits" if count == 1 else " wait") if count else "no mail waits for it")))
    end = snapshot.certificate[1]
    if end and end - snapshot.now.wall < CERTIFICATE_WARNING_S:
        left = end - snapshot.now.wall
        out.append(("bad" if left <= 0 else "warn", "The TLS certificate %s." % (
            "ends in %s" % format_duration(left) if left > 0 else "ended %s ago" % format_duration(-left))))
    if snapshot.status["spool"]["corrupt"]:
        out.append(("warn", "%s in corrupt/: look there." % say_count(snapshot.status["spool"]["corrupt"])))
    if snapshot.status["spool"]["loading"]:
        out.append(("warn", "The spool is still being read; the numbers below are not complete."))
    return out or [("good", "All is well: %s." % ("every primary that was tried is up, nothing waits"
                    if not snapshot.status["spool"]["messages"] else "mail is on its way"))]


def _pair(label: str, value: str, more: str = "", kind: str = "") -> str:
    """One of a description list; value and more are HTML."""
    return "<div><dt>%s</dt><dd%s>%s%s</dd></div>" % (
        label, ' class="%s"' % kind if kind else "", value, "<small>%s</small>" % more if more else "")


def _tiles(snapshot: Snapshot, now: Time) -> str:
    status, spool = snapshot.status, snapshot.status["spool"]
    oldest = min((one["oldest"] for one in status["domains"].values() if one["oldest"]), default=None)
    own = sum(one["queued"] for name, one in status["domains"].items() if not is_domain(name))
    end = snapshot.certificate[1]
    more = ", ".join(filter(None, (format_size(spool["bytes"]), "%d held" % spool["held"] if spool["held"] else "",
                                   say_count(own, "notice") if own else "")))
    return '<dl class="tiles card">%s</dl>\n' % "".join((
        _pair("Waiting", format(spool["messages"], ","), more),
        _pair("Oldest", format_duration(now - oldest) if oldest else "&ndash;",
              "since " + say_moment(oldest, now) if oldest else "nothing waits"),
        _pair("Disk left", format_size(spool["free"]), "refuses below %s" % format_size(snapshot.min_free)
              if snapshot.min_free else ""),
        _pair("Connections", format(status["connections"], ","), "SMTP clients now"),
        _pair("Certificate", format_duration(end - now) if end > now else "ended" if end else "none",
              time.strftime("%e %b %Y to ", time.localtime(snapshot.certificate[0]))
              + time.strftime("%e %b %Y", time.localtime(end)) if end else "STARTTLS is not offered")))


STATE_WORDS = {"up": "since %s, %s ago", "down": "since %s, for %s", "rejecting": "since %s, for %s",
               "unknown": "not heard of since %s, %s ago"}
STATE_REASONS = {"down": "It does not answer.  What waits goes out, oldest first, as soon as it does.",
                 "rejecting": "It answers, but refuses what it should take.  Nothing is returned to senders: one message at a "
                              "time is tried, and the rest follows when it is taken."}


def _domain(name: str, one: Mapping[str, Any], trace: Trace, now: Time) -> str:
    state = one["primary"]
    out = ['<section class="card"><div class="title"><h2>%s</h2><span class="pill %s"><i></i>%s</span>%s'
           '<span class="dim">%s</span></div>' % (
               escape(name), state, state, '<span class="pill held"><i></i>held</span>' if one["held"] else "",
               STATE_WORDS[state] % (say_moment(one["since"], now), format_duration(now - one["since"])))]
    if state in STATE_REASONS and (one["queued"] or state == "rejecting"):
        out.append('<p class="why dim">%s</p>' % STATE_REASONS[state])
    if one["last_error"]:
        out.append('<p class="error">%s</p>' % escape(one["last_error"]))
    leaving = "on its way" if one["queued"] and state == "up" else "&ndash;"
    next_try = say_next(one["next_probe"], now) if one["next_probe"] else leaving
    out.append('<dl class="facts">%s</dl>' % "".join((
        _pair("Waiting", format(one["queued"], ","), "", "big"), _pair("Size", format_size(one["bytes"])),
        _pair("Oldest", format_duration(now - one["oldest"]) if one["oldest"] else "&ndash;"),
        _pair("Next try", "held" if one["held"] else next_try))))
    out.append('<div class="charts">%s</div>' % "".join(_chart(trace, now, *window) for window in WINDOWS))
    out.append('<p class="counts dim">%s</p></section>\n' % "".join(
        "<span><b>%s</b> %s</span>" % (format(one[key], ","), key)
        for key in ("accepted", "delivered", "deferred", "bounced", "expired")))
    return "".join(out)


def _chart(trace: Trace, now: Time, title: str, span: float, step: float) -> str:
    """The queue's depth as a line and the primary's state as a band below it."""
    count = int(span / step)
    start = now - now % step + step - span
    depth = resample(trace.depth, start, step, count)
    peak = max((one for one in depth if one is not None), default=0)
    held = seconds_in(trace.states, start, now)
    known = sum(held.get(state, 0.0) for state in ("up", "down", "rejecting"))
    up = "primary up %s" % format_share(held.get("up", 0.0) / known) if known else "primary not heard of"
    line, area = draw_line(depth, max(peak, 10))
    parts, form = (4, "%H:%M") if span <= 86400.0 else (7, "%a")
    axis = "".join("<span>%s</span>" % time.strftime(form, time.localtime(start + span * n / parts)) for n in range(parts))
    about = "%s: at most %s waiting, %s" % (title, say_count(peak), up)
    return ('<figure><figcaption><span><b>%s</b></span><span>peak %s &middot; %s</span></figcaption>'
            '<svg class="depth" viewBox="0 0 %d 64" preserveAspectRatio="none" role="img" aria-label="%s">'
            '<path class="area" d="%s"/><path class="line" d="%s"/></svg>'
            '<svg class="band" viewBox="0 0 %d 10" preserveAspectRatio="none" aria-hidden="true">%s</svg>'
            '<div class="axis">%s<span>now</span></div></figure>' % (
                title, format(peak, ","), up, count, escape(about), area, line, count,
                draw_band(resample_states(trace.states, start, step, count)), axis))


def format_share(share: float) -> str:
    """A share of the time; 100 % only when it was all of it."""
    percent = share * 100
    return "%d%%" % percent if percent in (0.0, 100.0) else "%.1f%%" % min(99.9, max(0.1, percent))


def draw_line(depth: Sequence[Optional[int]], top: int) -> Tuple[str, str]:
    """Path data in a box 64 high, a step a column; a gap where nothing is known."""
    line, area = [], []
    before: Optional[int] = None
    begin = 0
    for column, value in enumerate([*depth, None]):
        if value == before:
            continue
        height = "%.4g" % (62.0 - 58.0 * value / top) if value is not None else ""
        if before is None:
            begin = column
            line.append("M%d %s" % (column, height))
            area.append("M%d 64V%s" % (column, height))
        else:
            line.append("H%d" % column + ("V%s" % height if height else ""))
            area.append("H%d" % column + ("V%s" % height if height else "V64H%dZ" % begin))
        before = value
    return "".join(line), "".join(area)


BAND_HEIGHTS = {"down": 10, "rejecting": 7, "up": 4, "unknown": 2, OFF: 2, "": 2}       # told apart without colours, too


def draw_band(states: Sequence[str]) -> str:
    out, at = [], 0
    for state, run in itertools.groupby(states):
        width = len(list(run))
        out.append('<rect class="s-%s" x="%d" y="%d" width="%d" height="%d"><title>%s</title></rect>' % (
            state, at, 10 - BAND_HEIGHTS[state], width, BAND_HEIGHTS[state], state or "nothing known"))
        at += width
    return "".join(out)


def _events(events: Sequence[Event], now: Time) -> str:
    out = ['<section class="card"><h2>Recent events</h2><ol>']
    row = '<li class="%s"><span class="dim n">%s</span><span class="dim">%s</span><span class="text">%s%s</span></li>'
    out += [row % (escape(event.level), say_moment(event.time, now), escape(event.service), escape(event.text),
                   ' <span class="dim">&times;%d</span>' % event.times if event.times > 1 else "")
            for event in events[:2 * EVENTS_MAX]]
    return "".join(out) + ("" if events else "<li>None yet.</li>") + "</ol></section>\n"


# == 15. SERVER ================================================================
# The selectors loop: listeners, clients, control socket, timers, reports of
# threads.  The only select().  Sockets, sessions and the queue's index belong to
# this thread, and it never waits for a disk or a peer.

class Connection:
    """One SMTP client: its socket, its session, and the message on its way to the spool."""
    __slots__ = ("sock", "session", "network", "out", "draft", "commit", "last", "data_since", "is_closing", "is_ended",
                 "is_reading", "is_writing", "is_greeted", "tls", "certificate", "collects")

    def __init__(self, sock: socket.socket, session: Session, network: str, now: float,
                 certificate: Optional["Certificate"]) -> None:
        self.sock = sock
        self.session = session
        self.network = network          # what counts as one client; empty for trusted ones
        self.out = bytearray()          # replies not yet sent
        self.draft: Optional[Draft] = None
        self.commit: Optional[Transaction] = None       # waits for the draft's last block to be written
        self.last = now                 # monotonic, of the last progress
        self.data_since = 0.0
        self.is_closing = False         # everything is said; what still comes is thrown away
        self.is_ended = False           # the client sends no more
        self.is_reading = True          # as the selector knows
        self.is_writing = False
        self.is_greeted = True          # False during greet_pause
        self.tls = Tls.NONE
        self.certificate = certificate  # as offered to it, whatever a SIGHUP brings
        self.collects: List[Site] = []          # what an ATRN just granted is for


class Tls(enum.Enum):
    """How far STARTTLS has come with a client."""
    NONE = 0
    ASKED = 1                   # our 220 must go out in the clear first
    HANDSHAKE = 2
    READY = 3


class Certificate:
    """What STARTTLS needs; read again when the files change on disk."""

    def __init__(self, certificate: str, key: str) -> None:
        """Raises OSError, ssl.SSLError among them."""
        self.files = (certificate, key)
        self.dates = (0.0, 0.0)         # begin and end, as far as they could be read
        self.stamp = self._stamp()
        self.context = self._load()

    def _stamp(self) -> Tuple[Any, ...]:
        return tuple((found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino) for found in map(os.stat, self.files))

    def _load(self) -> "ssl.SSLContext":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0) | ssl.OP_NO_COMPRESSION
        context.load_cert_chain(*self.files, password="")       # a key with a password is refused, not asked for on a terminal
        try:
            with open(self.files[0], "rb") as file:
                found = parse_pem(file.read())
            self.dates = (found.since, found.until)
        except ValueError:
            self.dates = (0.0, 0.0)     # OpenSSL reads more than we do; page and alerts miss them
        return context

    def renew(self) -> str:
        """Look for new files, before each handshake: two stats cost nothing
        beside it.  Returns what to log, or nothing.  Files that cannot be
        read, or do not belong together yet, leave the old certificate in
        use, and are told once and tried again when they change again."""
        try:
            stamp = self._stamp()
        except OSError as error:
            stamp, problem = (error.errno,), str(error)
        if stamp == self.stamp:
            return ""
        self.stamp = stamp
        try:
            if len(stamp) == 2:
                self.context = self._load()
                return "certificate renewed"
        except (OSError, ValueError) as error:
            problem = str(error)
        return "the certificate cannot be read, the old one stays: %s" % printable(problem)


class RecipientFile:
    """recipients = file:PATH: an address a line.  Read again when it changes."""

    def __init__(self, path: str) -> None:
        """Raises OSError."""
        self.path = path
        self.stamp = self.look()
        self.addresses, self.remark = self.read()

    def look(self) -> Tuple[int, int, int]:
        found = os.stat(self.path)
        return found.st_mtime_ns, found.st_size, found.st_ino

    def renew(self, _: Any) -> Any:
        """In a committer thread: what is new, or None."""
        stamp = self.look()
        return None if stamp == self.stamp else (stamp, *self.read())

    def read(self) -> Tuple[FrozenSet[str], str]:
        """The addresses, in lower case, and what to say of lines that hold none."""
        out, wrong = set(), []
        with open(self.path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                word = line.partition("#")[0].strip()
                try:
                    if word:
                        path, rest = parse_path("<%s>" % word, "5.1.3")
                        if not path.domain or rest:
                            raise Refuse(501, "5.1.3", "no domain")
                        out.add(str(path).lower())
                except Refuse:
                    wrong.append(str(number))
        return frozenset(out), "%s: not an address in line %s" % (self.path, ", ".join(wrong[:10])) if wrong else ""


def recipient_paths(cfg: Config) -> List[str]:
    return sorted({one.recipients[5:] for one in cfg.domains.values()
                   if isinstance(one.recipients, str) and one.recipients.startswith("file:")})


def secret_paths(cfg: Config) -> List[str]:
    passwords = [one.password for one in cfg.domains.values()] + [cfg.bounces_password]
    return sorted(set(filter(None, map(secret_path, passwords))))


class Controller:
    """One client of the control socket."""
    __slots__ = ("sock", "data", "out", "answers")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.data = b""
        self.out = bytearray()
        self.answers: Optional[Answers] = None


class Supervisor:
    """What a service manager and its service say to each other: readiness and
    watchdog as sd_notify(3), listening sockets as sd_listen_fds(3).  Where there
    is none, nothing here does anything.  Its variables are taken out of the
    environment: they are not for the programs we start."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        names = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
        given = {name: environ.pop(name, "") for name in names}
        self.address = os.fsencode(given["NOTIFY_SOCKET"])
        if self.address[:1] == b"@":
            self.address = b"\0" + self.address[1:]     # abstract, unix(7)
        # made now, so that a full table of descriptors does not look like a hanging loop
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if self.address else None
        ours = str(os.getpid())
        self.interval, self.next_ping = 0.0, INF
        if self.address and given["WATCHDOG_USEC"].strip("0").isdigit() and given["WATCHDOG_PID"] in ("", ours):
            self.interval = int(given["WATCHDOG_USEC"]) / 2e6       # half of what it waits, as sd_watchdog_enabled(3) says
            self.next_ping = 0.0
        self.names = given["LISTEN_FDNAMES"].split(":")
        self.count = int(given["LISTEN_FDS"]) if given["LISTEN_PID"] == ours and given["LISTEN_FDS"].isdigit() else 0

    def tell(self, *lines: str, wait_s: float = 0.0) -> None:
        """A manager that does not listen must not stop the mail."""
        if self.sock is not None:
            try:
                self.sock.settimeout(wait_s)
                self.sock.sendto("\n".join(lines).encode("utf-8"), self.address)
            except OSError:
                pass

    def ping(self, now: float, status: str) -> None:
        """From the loop alone: when it hangs, the manager hears nothing and starts us anew."""
        self.next_ping = now + self.interval
        self.tell("WATCHDOG=1", "STATUS=" + status)

    def sockets(self) -> List[socket.socket]:
        """Those passed, descriptors from 3 on.  Raises OSError: not a listening TCP socket."""
        out = []
        for number in range(self.count):
            name = self.names[number] if number < len(self.names) else ""
            try:
                os.set_inheritable(3 + number, False)
                sock = socket.socket(fileno=3 + number)
                if sock.family not in (socket.AF_INET, socket.AF_INET6) or not sock.getsockopt(
                        socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    raise OSError(errno.EINVAL, "not a listening TCP socket")
            except OSError as error:
                raise OSError(error.errno, "descriptor %d of the service manager%s: %s" % (
                    3 + number, name and " (%s)" % printable(name), error.strerror)) from None
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)      # as _bind() does
            out.append(sock)
        return out


# -- the status page: threads of their own, which see nothing but snapshots

class Window:
    """Through which other threads look at the relay.  The loop is asked for a
    snapshot at most once in PAGE_FRESH_S, and not at all while nobody looks."""

    def __init__(self, post: Callable[[Any], None]) -> None:
        self.post = post
        self.condition = threading.Condition()
        self.snapshot: Optional[Snapshot] = None
        self.asked: Optional[float] = None      # monotonic, a question the loop has not answered yet

    def show(self, snapshot: Snapshot) -> None:
        """The loop's answer."""
        with self.condition:
            self.snapshot, self.asked = snapshot, None
            self.condition.notify_all()

    def look(self) -> Tuple[Optional[Snapshot], float]:
        """The latest snapshot, and for how long the loop has not answered: 0.0 when it did in time."""
        with self.condition:
            now = time.monotonic()
            if self.snapshot is not None and now - self.snapshot.now.mono < PAGE_FRESH_S:
                return self.snapshot, 0.0
            since = self.asked
            if since is None:
                since = self.asked = now
                self.post(self)
            self.condition.wait_for(lambda: self.asked is None, max(0.0, since + PAGE_STALL_S - now))
            return self.snapshot, 0.0 if self.asked is None else time.monotonic() - since


PageBase: Any = http.server.ThreadingHTTPServer if http is not None else object
HandlerBase: Any = http.server.BaseHTTPRequestHandler if http is not None else object


class PageServer(PageBase):             # type: ignore[misc]
    """Serves the page from a bound socket.  However many come and however
    slowly they go: threads, octets and seconds are bounded, and the relay is not touched."""
    daemon_threads = True

    def __init__(self, sock: socket.socket, window: Window, token: str, say: Callable[[Any], None]) -> None:
        """`say` takes a line for the log, or an exception that is a bug."""
        super().__init__(sock.getsockname()[:2], PageHandler, bind_and_activate=False)
        self.socket.close()             # which it made; ours was bound before root was given up
        self.socket: Any = sock
        self.window = window
        self.token = token
        self.say = say
        self.open: Dict[socket.socket, Tuple[float, str]] = {}      # (monotonic when it is cut, client)
        self.lock = threading.Lock()
        self.texts: Dict[str, Tuple[Snapshot, str]] = {}            # per path, as last made
        self.end_reader, self.end_writer = socket.socketpair()
        self.thread = threading.Thread(target=self._run, name="status page", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def end(self) -> None:
        """Stop listening; answers under way may go on for as long as the process does."""
        self.end_writer.close()
        if self.thread.ident is not None:
            self.thread.join(PAGE_FRESH_S)
        self.socket.close()
        self.end_reader.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for sock in (self.socket, self.end_reader):
                selector.register(sock, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select(self._cut())]
                if self.end_reader in ready:
                    return
                if ready:
                    self._take()
                    time.sleep(PAGE_PACE_S)

    def _cut(self) -> Optional[float]:
        """End connections that took too long; returns the seconds until the next may have, None while there is none."""
        with self.lock:
            now = time.monotonic()
            for sock, (until, _) in self.open.items():
                if until <= now:
                    try:
                        sock.shutdown(socket.SHUT_RDWR)     # its thread wakes up and ends
                    except OSError:
                        pass
            return min((max(PAGE_FRESH_S, until - now) for until, _ in self.open.values()), default=None)

    def _take(self) -> None:
        try:
            sock, where = self.socket.accept()
        except BlockingIOError:
            return
        except OSError:                 # no descriptor left: not again at once
            time.sleep(PAGE_FRESH_S)
            return
        with self.lock:
            mine = sum(client == where[0] for _, client in self.open.values())
            is_room = len(self.open) < PAGE_CONNECTIONS and mine < PAGE_CONNECTIONS_PER_CLIENT
            if is_room:
                self.open[sock] = (time.monotonic() + PAGE_TOTAL_S, str(where[0]))
        if not is_room:
            sock.close()
            return
        try:
            self.process_request(sock, where)
        except RuntimeError:            # no more threads
            self.shutdown_request(sock)

    def text(self, path: str, snapshot: Snapshot, make: Callable[[Snapshot], str]) -> str:
        """Made once for each snapshot, however many ask."""
        known = self.texts.get(path)
        if known is None or known[0] is not snapshot:
            known = self.texts[path] = (snapshot, make(snapshot))
        return known[1]

    def shutdown_request(self, request: Any) -> None:
        try:
            request.shutdown(socket.SHUT_WR)
            request.settimeout(PAGE_FRESH_S)
            request.recv(PAGE_REQUEST_MAX)      # what is left unread would reset the connection, and our answer with it
        except OSError:
            pass
        with self.lock:                 # a descriptor that is used again must not be cut
            self.open.pop(request, None)
            request.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):      # that is a client that has left
            self.say(error)


class PageHandler(HandlerBase):         # type: ignore[misc]
    """One request, one answer, close.  GET and HEAD alone; the token for all but /healthz,
    which monitors and load balancers ask and which tells no more than what is wrong."""
    timeout = PAGE_TOTAL_S
    default_request_version = "HTTP/1.0"    # what cannot be read gets an answer with a header, too

    def version_string(self) -> str:
        return "etrn_relay"

    def handle(self) -> None:
        """The request is read whole before it is parsed, so that its size is known."""
        data = b""
        while b"\r\n\r\n" not in data and b"\n\n" not in data and len(data) <= PAGE_REQUEST_MAX:
            more = self.request.recv(PAGE_REQUEST_MAX)
            if not more:
                return                  # half a request
            data += more
        self.rfile = io.BytesIO(data)
        self.requestline, self.request_version, self.command = "", "HTTP/1.0", ""
        if len(data) > PAGE_REQUEST_MAX:
            return self.reply(431, "The request is too long.\n")
        self.raw_requestline = self.rfile.readline()
        if self.parse_request():
            self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        if self.command not in ("GET", "HEAD"):
            return self.reply(405, "Nothing can be changed here.\n", Allow="GET, HEAD")
        if path == "/healthz":
            return self.healthz()
        if not self.is_allowed():
            return self.reply(401, "A token is needed.\n", **{"WWW-Authenticate": 'Basic realm="etrn_relay", charset="UTF-8"'})
        if path not in ("/", "/metrics", "/status.json"):
            return self.reply(404, "There is /, /metrics, /healthz and /status.json.\n")
        snapshot, stalled = self.server.window.look()
        if snapshot is None or (stalled and path != "/"):
            return self.reply(503, "loop stalled: no answer for %s\n" % format_duration(stalled))
        if path == "/metrics":
            return self.reply(200, self.server.text(path, snapshot, format_metrics), "text/plain; version=0.0.4")
        if path == "/status.json":
            text = json.dumps(public_status(snapshot.status), indent=1) + "\n"
            return self.reply(200, text, "application/json")
        if stalled:
            text = format_page(snapshot, time.time(), stalled)
        else:
            text = self.server.text(path, snapshot, lambda snapshot: format_page(snapshot, snapshot.now.wall))
        self.reply(200, text, "text/html", **{"Content-Security-Policy": page_policy()})

    def healthz(self) -> None:
        snapshot, stalled = self.server.window.look()
        ills = ["loop stalled: no answer for %s" % format_duration(stalled)]
        if snapshot is not None and not stalled:
            ills = find_ills(snapshot)
        self.reply(503 if ills else 200, "".join(ill + "\n" for ill in ills) or "ok\n")

    def is_allowed(self) -> bool:
        """The token as bearer, RFC 6750 2.1, or as basic-auth password of any user, RFC 7617."""
        token = self.server.token.encode("utf-8")
        scheme, _, given = self.headers.get("Authorization", "").strip().partition(" ")
        data = given.strip().encode("latin-1", "replace")
        if scheme.lower() == "basic":
            try:
                data = base64.b64decode(data, validate=True).partition(b":")[2]
            except ValueError:
                data = b""
        elif scheme.lower() != "bearer":
            data = b""
        if not token or hmac.compare_digest(data, token):
            return True
        if scheme:                      # without one it is a browser that does not know yet
            address = str(self.client_address[0])
            self.server.say("refused: %s %s from %s: 401 wrong token" % (
                self.command, printable(self.path, 100), format_peer(address[7:] if address.startswith("::ffff:") else address)))
        return False

    def reply(self, code: int, text: str, kind: str = "text/plain", **headers: str) -> None:
        body = text.encode("utf-8", "backslashreplace")
        self.send_response(code)
        for name, value in {"Content-Type": kind + "; charset=utf-8", "Content-Length": str(len(body)),
                            "Content-Security-Policy": PAGE_POLICY % "", "Cache-Control": "no-store",
                            "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer",
                            "Connection": "close", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: Optional[str] = None, explain: Optional[str] = None) -> None:
        """What http.server finds wrong with a request."""
        self.reply(int(code), "The request is not understood.\n")

    def log_message(self, format: str, *arguments: Any) -> None:
        """The log is for mail."""


def is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback


def bind_page(where: Endpoint) -> socket.socket:
    """Raises OSError.  `[::]` takes IPv4, too: there is one address only."""
    sock = socket.socket(socket.AF_INET6 if ":" in where.host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if ":" in where.host:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(where.host != "::"))
        sock.setblocking(False)
        sock.bind((where.host, where.port))
        sock.listen(PAGE_CONNECTIONS)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, "cannot listen on %s: %s" % (str(where), error.strerror or error)) from None
    return sock


class Server:
    """The relay.  run() serves until stop(); a command without a running relay
    uses the same loop without listeners, see run_offline()."""

    def __init__(self, cfg: Config, spool: Spool, log: Log) -> None:
        self.cfg = cfg
        self.spool = spool
        self.log = log
        self.now = Now(time.monotonic(), time.time())
        self.started: Optional[float] = None            # monotonic
        self.started_at = self.now.wall
        self.selector = selectors.DefaultSelector()
        self.reports: Deque[Any] = collections.deque()
        self.is_woken = False
        self.wake_reader, self.wake_writer = socket.socketpair()
        for sock in (self.wake_reader, self.wake_writer):
            sock.setblocking(False)
        self.selector.register(self.wake_reader, selectors.EVENT_READ, self._on_wake)
        self.manager = Manager(cfg, spool, log, self.post, self.now)
        self.manager.on_size_limit = self._set_size_limit
        self.certificate: Optional[Certificate] = None
        self.door = Door(cfg, 0)
        self.listeners: Dict[Endpoint, socket.socket] = {}
        self.odmr_listeners: Dict[Endpoint, socket.socket] = {}
        self.resting: Set[socket.socket] = set()        # those not looked at, for want of descriptors
        self.supervisor = Supervisor({})
        self.passed: Dict[Endpoint, socket.socket] = {}     # listening sockets of a service manager
        self.is_passed_all = False      # they serve, and `listen` is not bound
        self.control: Optional[socket.socket] = None
        self.connections: Set[Connection] = set()
        self.decrypted: Set[Connection] = set()         # with octets left in their TLS layer
        self.reversed: Set[Connection] = set()  # that couriers have, since an ATRN
        self.controllers: Set[Controller] = set()
        self.clients: Dict[str, int] = {}       # connections per network
        self.most = cfg.max_connections
        self.reserve = -1               # a descriptor to give away when there are no more
        self.rate = Rate()
        self.persistence = Persistence()
        self.recipient_files: Dict[str, RecipientFile] = {}
        self.logins: Dict[str, str] = {}        # username: password
        self.is_sick = False
        self.is_healing = False
        self.stopping: Optional[float] = None   # monotonic, when told to stop
        self.is_cut = False
        self.signals: Deque[int] = collections.deque()
        self.next_sweep = self.now.mono
        self.next_file_check = self.now.mono + FILE_CHECK_S
        self.page: Optional[PageServer] = None
        self.page_at: Optional[Endpoint] = None         # as configured
        self.window = Window(self.post)
        self.history = History()
        self.next_history = INF         # monotonic, when it may be written again; never without run()
        self.is_news = False            # a primary's state has changed in this turn
        self.acceptance = Histogram(ACCEPTANCE_BOUNDS)
        self.queue_time = Histogram(QUEUE_BOUNDS)
        self.manager.on_delivered = self.queue_time.observe
        self.offline: Optional[Callable[[], bool]] = None       # a command's own loop: True when it is done
        self._set_size_limit()

    # -- from other threads and from signal handlers

    def post(self, report: Any) -> None:
        """Hand something to the loop."""
        self.reports.append(report)
        if not self.is_woken and not (isinstance(report, Outcome) and report.can_wait):
            self.is_woken = True
            try:
                self.wake_writer.send(b"\0")
            except OSError:
                pass                    # full, so it will wake; or closed, so nobody is there

    def stop(self) -> None:
        self.post(signal.SIGTERM)

    # -- opening

    def adopt(self, sockets: Iterable[socket.socket]) -> None:
        """Listening sockets of a service manager: each serves as the address of
        `listen` or `odmr_listen` that it has.  When none has one, all of them
        serve SMTP, and `listen` is not bound.  SIGHUP leaves them open."""
        for sock in sockets:
            where = Endpoint(*sock.getsockname()[:2])
            self.passed[where] = sock
            if where.host == "::" and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
                self.passed.setdefault(Endpoint("0.0.0.0", where.port), sock)       # takes IPv4 clients, too
        wanted = {self.passed[where] for where in self.cfg.listen + self.cfg.odmr_listen if where in self.passed}
        self.is_passed_all = bool(self.passed) and not wanted
        for where, sock in list(self.passed.items()):
            if self.is_passed_all and sock not in self.listeners.values():
                self.listeners[where] = self._serve_on(sock)
            elif not self.is_passed_all and sock not in wanted:
                if sock.fileno() >= 0:
                    self.log.write("master", "the service manager passed %s, which is not in listen: closed" % str(where),
                                   "warning")
                self.passed.pop(where).close()

    def listen(self) -> None:
        """Bind what the configuration names.  Raises OSError with the address in
        it.  A machine without IPv6 serves the default addresses all the same."""
        default = KINDS["listen"](next(o.default for o in OPTIONS if o.name == "listen" and o.section == "relay"))
        fresh: List[Tuple[Dict[Endpoint, socket.socket], Endpoint]] = []
        for listeners, wanted in ((self.listeners, () if self.is_passed_all else self.cfg.listen),
                                  (self.odmr_listeners, self.cfg.odmr_listen)):
            for where in wanted:
                if where in listeners or self.passed.get(where) in listeners.values():
                    continue
                try:
                    listeners[where] = self._bind(where, listeners is self.odmr_listeners)
                    fresh.append((listeners, where))
                except OSError as error:
                    if listeners is self.listeners and self.cfg.listen == default and ":" in where.host and listeners:
                        self.log.write("master", "no IPv6 here: %s: %s" % (where, error.strerror), "warning")
                        continue
                    for its, one in fresh:          # all or none
                        self._unlisten(its.pop(one))
                    raise OSError(error.errno, "cannot listen on %s: %s" % (str(where), error.strerror)) from None
        passed = self.passed.values()
        for listeners, wanted in ((self.listeners, self.cfg.listen), (self.odmr_listeners, self.cfg.odmr_listen)):
            for where in [where for where, sock in listeners.items() if where not in wanted and sock not in passed]:
                self._unlisten(listeners.pop(where))
        self.manager.listeners = self._bound(self.listeners) + self._bound(self.odmr_listeners)

    @staticmethod
    def _bound(listeners: Mapping[Endpoint, socket.socket]) -> Tuple[Endpoint, ...]:
        return tuple(Endpoint(*sock.getsockname()[:2]) for sock in listeners.values())

    def _bind(self, where: Endpoint, is_odmr: bool = False) -> socket.socket:
        if where in self.passed:
            return self._serve_on(self.passed[where], is_odmr)
        sock = socket.socket(socket.AF_INET6 if ":" in where.host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)      # connections inherit it
            if ":" in where.host:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setblocking(False)
            sock.bind((where.host, where.port))
            sock.listen(LISTEN_BACKLOG)
        except OSError:
            sock.close()
            raise
        return self._serve_on(sock, is_odmr)

    def _serve_on(self, sock: socket.socket, is_odmr: bool = False) -> socket.socket:
        self.selector.register(sock, selectors.EVENT_READ, lambda mask: self._on_accept(sock, is_odmr))
        return sock

    def _unlisten(self, sock: socket.socket) -> None:
        if sock in self.resting:
            self.resting.discard(sock)
        else:
            self.selector.unregister(sock)
        sock.close()

    def load_logins(self) -> None:
        """Who may authenticate: the files of passwords are read here, at the start and at SIGHUP.  Raises OSError."""
        logins = {}
        for cfg in self.cfg.domains.values():
            if cfg.username and cfg.username not in logins:
                logins[cfg.username] = read_secret(cfg.password)
                if not logins[cfg.username]:
                    raise OSError(0, "username = %s: the password is empty" % printable(cfg.username))
            if cfg.primary in WAITS and not cfg.username:
                self.log.write("master", "%s: primary = %s needs a username: without one its mail cannot leave" % (
                    cfg.name, cfg.primary), "warning")
        if any(cfg.primary == "atrn" for cfg in self.cfg.domains.values()) and not self.cfg.odmr_listen:
            self.log.write("master", "primary = atrn needs odmr_listen: without it no mail can be collected", "warning")
        self.logins = logins

    def open_page(self) -> None:
        """Bind the status page's address, when it is a new one.  Raises OSError, and then an old one stays in use."""
        where = self.cfg.status_listen
        if self.page is not None and where == self.page_at:
            self.page.token = self.cfg.status_token
            return
        page = None
        if where is not None and http is None:
            self.log.write("master", "this Python has no http.server module: there is no status page", "warning")
        elif where is not None:
            page = PageServer(bind_page(where), self.window, self.cfg.status_token, self._say_page)
        old, self.page, self.page_at = self.page, page, where
        if old is not None:
            old.end()
        if self.started is not None:
            self._start_page()

    def _start_page(self) -> None:
        """Threads come after root was given up."""
        if self.page is None:
            return
        self.page.start()
        where = Endpoint(*self.page.socket.getsockname()[:2])
        self.log.write("master", "status page on http://%s/" % str(where))
        if not self.cfg.status_token and not is_loopback(where.host):
            self.log.write("master", "the status page has no token: whoever reaches %s reads it" % str(where), "warning")

    def _say_page(self, what: Any) -> None:
        """From the page's threads."""
        if isinstance(what, BaseException):
            self.post([(self.log.bug, what)])
        else:
            self.post([(lambda text: self.log.write("http", text), what)])

    def load_recipients(self) -> None:
        """The files that `recipients` names.  Raises OSError."""
        self.recipient_files = {path: RecipientFile(path) for path in recipient_paths(self.cfg)}
        for file in self.recipient_files.values():
            if file.remark:
                self.log.write("master", file.remark, "warning")

    def _check_recipients(self) -> None:
        """Now and then; read in a committer thread, and a file that cannot be read leaves what was known."""
        if self.now.mono < self.next_file_check:
            return
        self.next_file_check = self.now.mono + FILE_CHECK_S
        for file in self.recipient_files.values():
            self.manager.committers.submit(Task(file.renew), functools.partial(self._on_recipients, file))

    def _on_recipients(self, file: RecipientFile, result: Any) -> None:
        if isinstance(result, Exception):
            self.log.write("master", "%s: not read again: %s" % (file.path, printable(str(result))), "warning")
        elif result is not None:
            file.stamp, file.addresses, file.remark = result
            self.log.write("master", "%s: %d recipients%s" % (
                file.path, len(file.addresses), "; " + file.remark if file.remark else ""))

    def load_certificate(self) -> Optional[Certificate]:
        """Raises OSError when it is configured but of no use."""
        if self.cfg.tls_certificate and ssl is None:
            self.log.write("master", "this Python has no ssl module: STARTTLS is not offered", "warning")
        elif self.cfg.tls_certificate:
            try:
                return Certificate(self.cfg.tls_certificate, self.cfg.tls_key)
            except (OSError, ValueError) as error:
                raise OSError(0, "certificate %s: %s" % (self.cfg.tls_certificate, error)) from None
        return None

    def _reload_certificate(self) -> Optional[Certificate]:
        """At SIGHUP.  The same files, half renewed or now only root's to read, leave the old certificate in use."""
        try:
            return self.load_certificate()
        except OSError as error:
            if self.certificate is None or self.certificate.files != (self.cfg.tls_certificate, self.cfg.tls_key):
                raise
            self.log.write("master", "%s; the old one stays" % error.strerror, "warning")
            return self.certificate

    def set_certificate(self, certificate: Optional[Certificate]) -> None:
        self.certificate = certificate
        self.door.has_tls = certificate is not None
        self._note_certificate()

    def _note_certificate(self) -> None:
        self.manager.certificate_end = (self.certificate.dates[1] if self.certificate else 0.0) or INF

    def _renew_certificate(self, certificate: Optional[Certificate]) -> None:
        """Before each handshake, and now and then; files that cannot be read leave the old one in use."""
        remark = certificate.renew() if certificate is not None else ""
        if remark:
            self.log.write("master", remark, "warning" if "cannot" in remark else "info")
            self._note_certificate()

    def open_control(self) -> None:
        """The socket commands come through; only the spool's owner may connect."""
        path = os.path.join(self.spool.path, "control")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.spool.remove_control()
            mask = os.umask(0o177)
            try:
                sock.bind(short_path(path, self.spool.directory))
            finally:
                os.umask(mask)
            sock.listen(16)
            sock.setblocking(False)
        except OSError as error:
            sock.close()
            self.log.write("master", "no control socket, commands will not work: %s" % error, "warning")
            return
        self.control = sock
        self.selector.register(sock, selectors.EVENT_READ, self._on_control)

    # -- the loop

    def run(self) -> None:
        """Serve until told to stop.  listen() came before."""
        self.started = self.now.mono
        self._reserve_files()
        self.open_control()
        self.manager.load_state()
        self.history.from_values(self.spool.load_state("history.json"), self.now.wall)
        self.log.on_event = self._on_event
        self.next_history = self.now.mono + HISTORY_SAVE_S
        self._set_size_limit()
        self.manager.load()
        self.log.write("master", "started: version %s, process %d, listening on %s, spool %s" % (
            __version__, os.getpid(), " ".join(map(str, self._bound(self.listeners))) + "".join(
                ", ODMR on %s" % str(where) for where in self._bound(self.odmr_listeners)), printable(self.spool.path)))
        self._start_page()
        self.log.flush()
        self.supervisor.tell("READY=1", "STATUS=" + self._state(), wait_s=NOTIFY_S)
        self._loop()

    def _state(self) -> str:
        """For the service manager's own status."""
        return "%d messages waiting, %d connections" % (self.manager.scheduler.messages()[0], len(self.connections))

    def _loop(self) -> None:
        while not self._is_over():
            self._turn(self._pause())
        self._close()

    def _turn(self, pause: float) -> None:
        """One round: wait, then read the clock once and do all there is."""
        events = self.selector.select(pause)
        self.now = Now(time.monotonic(), time.time())
        self.manager.now = self.now
        for key, mask in events:
            self._guard(key.data, mask)
        for connection in [one for one in self.decrypted if one.is_reading]:
            self._guard(self._on_client, connection, selectors.EVENT_READ)
        while self.signals:
            self._guard(self._on_signal, self.signals.popleft())
        self.is_woken = False           # before the reports are read: what comes later wakes again
        while self.reports:
            self._guard(self._on_report, self.reports.popleft())
        self._guard(self.manager.tick, self.now)
        for controller in [one for one in self.controllers if one.answers is not None]:
            self._guard(self._answer, controller)
        if self.now.mono >= self.next_sweep:
            self.next_sweep = self.now.mono + SWEEP_S
            self._guard(self._sweep)
        if self.is_news:
            self._guard(self._note_history)
        if self.now.mono >= self.supervisor.next_ping:
            self.supervisor.ping(self.now.mono, self._state())
        self.log.flush()

    def _guard(self, step: Callable[..., Any], *arguments: Any) -> None:
        """A bug costs the step it is in, never the relay."""
        try:
            step(*arguments)
        except Exception as error:
            self.log.bug(error)

    def _pause(self) -> float:
        if self.reports or self.signals or any(one.is_reading for one in self.decrypted):
            return 0.0
        at = min(self.manager.wake(self.now), self.supervisor.next_ping)
        if self.connections or self.is_sick:
            at = min(at, self.next_sweep)
        if self.stopping is not None:
            at = min(at, self.now.mono + COMMAND_POLL_S)
        if self.now.mono - self.manager.last_outcome < GATHERING_S:
            at = min(at, self.now.mono + GATHER_S)
        if any(one.answers is not None for one in self.controllers) or self.offline is not None:
            at = min(at, self.now.mono + COMMAND_POLL_S)
        return max(0.0, at - self.now.mono)

    def _on_wake(self, mask: int) -> None:
        try:
            self.wake_reader.recv(4096)
        except BlockingIOError:
            pass

    def _on_report(self, report: Any) -> None:
        if isinstance(report, int):
            self._on_signal(report)
        elif isinstance(report, Window):
            report.show(self.snapshot())
        else:
            self.manager.handle(report, self.now)

    def _on_signal(self, number: int) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            self._begin_stop()
        elif number == signal.SIGHUP:
            self.supervisor.tell("RELOADING=1", "MONOTONIC_USEC=%d" % (time.monotonic_ns() // 1000))
            try:
                self._reload()
            finally:
                self.supervisor.tell("READY=1")
        elif number == signal.SIGUSR1:
            self.log.write("flush", "signal: site=all, messages=%d" % self.manager.scheduler.messages()[0])
            self.manager.flush("all")

    def _reload(self) -> None:
        """SIGHUP.  A configuration that cannot be used is refused, and the old one stays, whole."""
        old, files, logins = self.cfg, self.recipient_files, self.logins
        try:
            self.log.reopen()           # after a rotation, whatever comes of the rest
            cfg = read_config(old.file)
            for name in ("spool", "user"):
                if getattr(cfg, name) != getattr(old, name):
                    self.log.write("master", "%s changes at the next start" % name, "warning")
            self.cfg = cfg = dataclasses.replace(cfg, spool=old.spool, user=old.user)
            certificate = self._reload_certificate()
            self.load_recipients()
            self.load_logins()
            if cfg.log != old.log:
                self.log.reopen(cfg.log)
            self.listen()
        except Exception as error:
            self.cfg, self.recipient_files, self.logins = old, files, logins
            if self.log.where != old.log:
                with contextlib.suppress(OSError):
                    self.log.reopen(old.log)
            if not isinstance(error, (ConfigError, OSError)):
                self.log.bug(error)
            text = describe(error) if isinstance(error, OSError) else str(error)
            self.log.write("master", "not reloaded, the old configuration stays: %s" % printable(text), "error")
            return
        try:
            self.open_page()
        except OSError as error:
            self.log.write("master", "status page: %s; the old one stays" % error.strerror, "error")
            self.cfg = cfg = dataclasses.replace(cfg, status_listen=old.status_listen, status_token=old.status_token)
        self.log.level, self.log.host = LEVELS[cfg.log_level], short_name(cfg.hostname)
        self.door = Door(cfg, 0)        # sessions under way keep the old one to their end
        self.set_certificate(certificate)
        self.manager.reconfigure(cfg)
        self._set_size_limit()
        self._reserve_files()
        self.log.write("master", "configuration reread")

    def _set_size_limit(self) -> None:
        """SIZE: ours, or the smallest known of all primaries."""
        known = [self.cfg.max_message_size] + [
            site.size_limit for site in self.manager.scheduler.sites.values() if self.manager.scheduler.is_served(site.name)]
        self.door.size_limit = min((limit for limit in known if limit), default=0)

    def _reserve_files(self) -> None:
        """As many descriptors as we may have, and one in reserve: without it, a
        full table would leave a waiting client in the backlog and spin the loop."""
        try:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            reserved = RESERVED_FILES + (PAGE_CONNECTIONS if self.page is not None else 0)
            wanted = 3 * self.cfg.max_connections + 2 * LINES_MAX + reserved   # each client may have a body and a sidecar open
            if soft < wanted:
                soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            self.most = min(self.cfg.max_connections, max(10, soft - reserved))
        except (OSError, ValueError):
            self.most = self.cfg.max_connections
        self._keep_reserve()

    # -- stopping

    def _begin_stop(self) -> None:
        if self.stopping is not None:
            return
        self.stopping = self.now.mono
        self.log.write("master", "stopping")
        self.supervisor.tell("STOPPING=1")
        for listeners in (self.listeners, self.odmr_listeners):
            for sock in listeners.values():
                self._unlisten(sock)
            listeners.clear()
        for connection in list(self.connections):
            if connection.session.is_idle:
                self._shut(connection, self._going())
        self.manager.stop()

    def _going(self) -> Reply:
        return Reply(421, "4.3.2", "%s Service shutting down" % self.cfg.hostname)

    def _is_over(self) -> bool:
        """Everything that was acknowledged is safe at any time; the waiting here
        is for sessions in mid-message and for what is being sent."""
        if self.offline is not None:
            return self.offline()
        if self.stopping is None:
            return False
        waited = self.now.mono - self.stopping
        if waited > STOP_S / 2 and not self.is_cut:
            self.is_cut = True
            self.manager.cut()
            for connection in list(self.connections):
                if connection.session.waiting is None:
                    self._shut(connection, self._going())
        is_quiet = not (self.manager.couriers or self.manager.chains or self.reports) and all(
            connection.is_closing and not connection.out for connection in self.connections)
        return is_quiet or waited > STOP_S

    def _close(self) -> None:
        self.manager.save_state(lambda result: None)
        if self.started is not None:
            self._note_history(OFF)
            self._save_history()
        if not self.manager.committers.stop(STOP_DISK_S):
            self.log.write("master", "the disk does not answer: left alone; what was not yet on it was not acknowledged", "error")
        while self.reports:
            self._guard(self._on_report, self.reports.popleft())
        for connection in list(self.connections):
            self._drop(connection)
        for sock in [*(one.sock for one in self.controllers), self.wake_reader, self.wake_writer, *self.listeners.values(),
                     *self.odmr_listeners.values()]:
            sock.close()
        if self.page is not None:
            self.page.end()
        if self.control is not None:
            self.control.close()
            self.spool.remove_control()
        if self.reserve >= 0:
            os.close(self.reserve)
        self.selector.close()
        if self.started is not None:
            self.log.write("master", "stopped")
        self.log.flush()

    # -- what the status page shows

    def snapshot(self) -> Snapshot:
        """Cheap whatever waits: sums that are kept, and copies of short lists."""
        status = collect_status(self.manager, self.crowd, self.started)
        self._note_history()
        return Snapshot(self.now, self.cfg.hostname, status, self.started_at, self.cfg.min_free_space, self.manager.load_error,
                        self.certificate.dates if self.certificate else (0.0, 0.0),
                        {name: self.history.copy(name) for name in status["domains"]}, self.history.latest(),
                        self.acceptance.values(), self.queue_time.values())

    def _on_event(self, service: str, text: str, level: str) -> None:
        self.history.tell(service, text, level, self.now.wall)
        self.is_news = self.is_news or service == "primary"

    def _note_history(self, state: str = "") -> None:
        """Where all domains are now; `state` OFF when we end."""
        self.is_news = False
        for name in self.cfg.domains:
            if name[0] != ".":
                self.manager.scheduler.site(name, self.now)
        for site in self.manager.scheduler.sites.values():
            if not site.cfg.is_notices:
                self.history.note(site.name, len(site.entries), state or site.state.value, self.now.wall)

    def _save_history(self) -> None:
        self.next_history = self.now.mono + HISTORY_SAVE_S
        values = self.history.to_values(self.manager.scheduler.sites, self.now.wall)

        def saved(result: Any) -> None:
            if isinstance(result, Exception):
                self.log.write("master", "history.json cannot be written: %s" % printable(str(result)), "warning")
        self.manager.committers.submit(Task(lambda spool: spool.save_history(values)), saved)

    # -- SMTP clients

    def _on_accept(self, listener: socket.socket, is_odmr: bool = False) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            if not self._keep_reserve():
                return self._listen_later(listener)
            try:
                sock, where = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in ACCEPT_ERRORS:
                    return              # gone again before we looked
                if not self._turn_away(listener):
                    return self._listen_later(listener)
                continue
            sock.setblocking(False)
            self._welcome(sock, str(where[0]), is_odmr)

    def _turn_away(self, listener: socket.socket) -> bool:
        """No descriptor is left: the reserve is lent to tell one client so.
        False when that did not work, because a thread was quicker to take it."""
        os.close(self.reserve)
        self.reserve = -1
        try:
            sock, _ = listener.accept()
        except OSError:
            return False
        self._refuse(sock, "too many connections")
        return True

    def _keep_reserve(self) -> bool:
        """Before a client is let in: it would have the last one, and nobody after
        it could be told."""
        if self.reserve < 0:
            with contextlib.suppress(OSError):
                self.reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        return self.reserve >= 0

    def _listen_later(self, listener: socket.socket) -> None:
        """Who waits at the listener cannot be taken: to look at it again at once would spin the loop."""
        handler = self.selector.unregister(listener).data
        self.resting.add(listener)
        self.log.write("smtpd", "out of file descriptors: no new connection for %d s" % SWEEP_S, "warning")

        def again() -> None:
            if listener in self.resting:
                self.resting.discard(listener)
                self.selector.register(listener, selectors.EVENT_READ, handler)
        self.manager.later(SWEEP_S, again)

    def _refuse(self, sock: socket.socket, why: str) -> None:
        try:
            sock.setblocking(False)
            sock.send(Reply(421, "4.7.0", "%s Error: %s" % (self.cfg.hostname, why)).wire())
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        sock.close()

    @property
    def crowd(self) -> int:
        """Clients connected, those among them that became servers."""
        return len(self.connections) + len(self.reversed)

    def _welcome(self, sock: socket.socket, address: str, is_odmr: bool = False) -> None:
        if address.startswith("::ffff:") and "." in address:
            address = address[7:]
        self.manager.on_client(address)
        network = "" if self.cfg.is_trusted(address) else client_network(address)
        most = self.cfg.max_connections_per_client
        if self.crowd >= self.most or (network and most and self.clients.get(network, 0) >= most):
            self.log.write("smtpd", "NOQUEUE: reject: CONNECT from %s: 421 4.7.0 too many connections" % format_peer(address))
            return self._refuse(sock, "too many connections")
        connection = Connection(sock, Session(self.door, address, is_odmr=is_odmr), network, self.now.mono, self.certificate)
        self.connections.add(connection)
        if network:
            self.clients[network] = self.clients.get(network, 0) + 1
        self.selector.register(sock, selectors.EVENT_READ, lambda mask: self._on_client(connection, mask))
        self.log.write("smtpd", "connect from %s" % format_peer(address), "debug")
        if self.cfg.greet_pause:
            connection.is_greeted = False
            return self.manager.later(self.cfg.greet_pause, lambda: self._greet(connection))
        self._greet(connection)

    def _greet(self, connection: Connection) -> None:
        if connection in self.connections and not connection.is_closing:
            connection.is_greeted = True
            self._act(connection, connection.session.greet())

    def _on_client(self, connection: Connection, mask: int) -> None:
        try:
            if connection.tls is Tls.HANDSHAKE:
                return self._handshake(connection)
            if mask & selectors.EVENT_WRITE:
                self._send(connection)
            if mask & selectors.EVENT_READ and connection in self.connections:
                self._receive(connection)
        except Exception as error:
            self.log.bug(error)
            self._shut(connection, Reply(421, "4.3.0", "%s Internal error" % self.cfg.hostname))

    def _handshake(self, connection: Connection) -> None:
        """As far as it goes without waiting."""
        try:
            if connection.tls is Tls.ASKED:
                self._wrap(connection)
            assert isinstance(connection.sock, ssl.SSLSocket)
            connection.sock.do_handshake()
        except ssl.SSLWantReadError:
            return self._watch(connection, True, False)
        except ssl.SSLWantWriteError:
            return self._watch(connection, False, True)
        except (OSError, ValueError) as error:
            self.log.write("smtpd", "TLS handshake failed from %s: %s" % (
                format_peer(connection.session.address), printable(str(error), 200)))
            return self._drop(connection)
        connection.tls = Tls.READY
        connection.last = self.now.mono
        cipher = connection.sock.cipher()
        agreed = (connection.sock.version() or "TLS", cipher[0] if cipher else "unknown")
        self._act(connection, connection.session.resume(agreed))

    def _wrap(self, connection: Connection) -> None:
        """Our 220 has gone out in the clear.  Raises OSError when the client has left."""
        certificate = connection.certificate
        assert certificate is not None
        connection.tls = Tls.HANDSHAKE
        self._watch(connection, False, False)
        self._renew_certificate(certificate)
        connection.sock = certificate.context.wrap_socket(connection.sock, server_side=True, do_handshake_on_connect=False)

    def _receive(self, connection: Connection) -> None:
        """Not all that a TLS record held need be read at once.  The selector does
        not see what stays in the TLS layer, so that _turn() comes back for it."""
        self.decrypted.discard(connection)
        try:
            is_talking = connection.session.mode is Mode.COMMAND
            data = connection.sock.recv(COMMAND_OCTETS if is_talking else min(RECEIVE_OCTETS, self._share()))
            if connection.tls is Tls.READY and connection.sock.pending():       # type: ignore[attr-defined]
                self.decrypted.add(connection)
        except WANTS:
            return
        except OSError:
            return self._drop(connection)
        if not data:
            connection.is_ended = True
            return self._look(connection)
        if connection.is_closing:
            return                      # lingering: thrown away, so that our last reply is not lost to a reset
        if not connection.is_greeted:
            reply = Reply(521, "5.5.1", "%s You speak before the banner" % self.cfg.hostname)
            connection.session.note_reject("PREGREET", reply, "")
            return self._act(connection, connection.session.shut(reply))
        actions = connection.session.receive(data)
        if actions or connection.session.mode is not Mode.COMMAND:
            connection.last = self.now.mono     # progress is a command or data, not one more octet of a line
        self._act(connection, actions)

    def _act(self, connection: Connection, actions: List[Action]) -> None:
        """Carry out what the session wants, in its order."""
        todo = collections.deque(actions)
        while todo:
            action = todo.popleft()
            if isinstance(action, Send):
                connection.out += action.data
            elif isinstance(action, Body):
                self._keep(connection, action)
            elif isinstance(action, Discard):
                self._discard(connection)
            elif isinstance(action, Note):
                self.log.write("smtpd", action.text)
            elif isinstance(action, Close):
                connection.is_closing = True
                connection.is_ended = connection.is_ended or action.at_once
            elif isinstance(action, Reverse):
                self._reverse(connection, action.early)
            else:
                answer = self._ask(connection, action)
                if answer is not WAIT:
                    todo.extendleft(reversed(connection.session.resume(answer)))
        self._send(connection)

    def _send(self, connection: Connection) -> None:
        if connection.out:
            try:
                sent = connection.sock.send(connection.out)
                del connection.out[:sent]
                if sent:
                    connection.last = self.now.mono
            except WANTS:
                pass
            except OSError:
                return self._drop(connection)
        self._look(connection)

    def _look(self, connection: Connection) -> None:
        """Close what is over, and tell the selector what else to look for."""
        if connection not in self.connections or connection.tls is Tls.HANDSHAKE:
            return
        session = connection.session
        if connection.tls is Tls.ASKED:         # nothing is read before the handshake
            if connection.out:
                return self._watch(connection, False, True)
            return self._handshake(connection)
        if not connection.out and session.waiting is None and (connection.is_ended or connection.is_closing):
            if connection.tls is Tls.READY:
                self._end_tls(connection)
            if connection.is_ended:
                return self._drop(connection)
            try:
                connection.sock.shutdown(socket.SHUT_WR)
            except OSError:
                return self._drop(connection)
        draft = connection.draft
        reading = not connection.is_ended and len(connection.out) < OUTPUT_MAX and len(session.buffer) < RECEIVE_OCTETS and (
            draft is None or draft.pending < self._share())
        self._watch(connection, reading, bool(connection.out))

    @staticmethod
    def _end_tls(connection: Connection) -> None:
        """Our close_notify is sent; theirs is not waited for."""
        connection.tls = Tls.NONE
        try:
            connection.sock.unwrap()    # type: ignore[attr-defined]
        except (OSError, ValueError):
            pass

    def _watch(self, connection: Connection, reading: bool, writing: bool) -> None:
        """Have the selector look for this, and nothing else."""
        if (reading, writing) == (connection.is_reading, connection.is_writing):
            return
        was = connection.is_reading or connection.is_writing
        connection.is_reading, connection.is_writing = reading, writing
        mask = selectors.EVENT_READ * reading | selectors.EVENT_WRITE * writing
        handler = lambda mask: self._on_client(connection, mask)        # noqa: E731
        if mask and was:
            self.selector.modify(connection.sock, mask, handler)
        elif mask:
            self.selector.register(connection.sock, mask, handler)
        else:
            self.selector.unregister(connection.sock)

    def _shut(self, connection: Connection, reply: Reply) -> None:
        """End a session from our side."""
        if not connection.is_closing:
            self._discard(connection)
            connection.session.waiting = None
            self._act(connection, connection.session.shut(reply))

    def _drop(self, connection: Connection) -> None:
        if connection not in self.connections:
            return
        self.connections.discard(connection)
        self.decrypted.discard(connection)
        self._discard(connection)
        self._watch(connection, False, False)
        connection.sock.close()
        self._uncount(connection)

    def _uncount(self, connection: Connection) -> None:
        if connection.network:
            self.clients[connection.network] -= 1
            if not self.clients[connection.network]:
                del self.clients[connection.network]
        self.log.write("smtpd", "disconnect from %s" % format_peer(connection.session.address), "debug")

    def _reverse(self, connection: Connection, early: bytes) -> None:
        """ATRN: the socket leaves the loop, with what is still to be said to it,
        before a courier's thread gets it.  Nothing is left in a TLS layer: see _receive()."""
        session = connection.session
        self._watch(connection, False, False)
        self.connections.discard(connection)
        self.decrypted.discard(connection)
        self.reversed.add(connection)
        try:
            port = int(connection.sock.getpeername()[1])
        except OSError:
            port = 0                    # gone already, as the courier will find
        try:
            host = parse_domain(session.helo)
        except ValueError:
            host = session.address
        unsaid, connection.out = bytes(connection.out), bytearray()

        def over() -> None:
            self.reversed.discard(connection)
            self._uncount(connection)
        self.manager.turn_around(connection.collects, Hop(host, session.address, port), connection.sock, unsaid, early, over)

    # -- questions of a session

    def _ask(self, connection: Connection, question: Ask) -> Any:
        if question.what == "mail":
            return self._may_mail(connection, question.value)
        if question.what == "rcpt":
            return self._may_rcpt(connection, question.value)
        if question.what == "starttls":
            connection.tls = Tls.ASKED
            return WAIT
        if question.what == "etrn":
            session = connection.session
            return answer_etrn(self.manager, question.value, session.address, session.name, session.username)
        if question.what == "challenge":        # RFC 2195 2
            return ("<%s.%d@%s>" % (secrets.token_hex(12), self.now.wall, self.cfg.hostname)).encode("ascii")
        if question.what == "login":
            return self._judge_login(connection, question.value)
        if question.what == "atrn":
            session = connection.session
            reply, connection.collects = answer_atrn(self.manager, session.username, question.value, session.address,
                                                     session.name, session.tls is not None)
            return reply
        return self._commit(connection, question.value)

    def _judge_login(self, connection: Connection, login: Login) -> Any:
        """None when it is right.  A name that nobody has takes as long as a wrong password."""
        session, password = connection.session, self.logins.get(login.username)
        try:
            is_right = login.is_right(secrets.token_hex(16) if password is None else password)
        except ValueError as error:
            self.log.write("smtpd", "AUTH cannot be judged here: %s" % printable(str(error)), "error")
            return Reply(454, "4.7.0", "Temporary authentication failure")
        if is_right and password is not None:
            return None

        def refuse() -> None:
            if session.waiting is not None and connection in self.connections and not connection.is_closing:
                self._act(connection, session.resume(Reply(535, "5.7.8", "authentication failed")))
        self.manager.later(LOGIN_FAILED_S, refuse)
        return WAIT

    def _may_mail(self, connection: Connection, transaction: Transaction) -> Optional[Reply]:
        if self.stopping is not None:
            return self._going()
        most = self.cfg.max_message_rate
        if most and connection.network and self.rate.is_over(connection.network, most, self.now):
            return Reply(450, "4.7.1", "Too many messages a minute from your address")
        if self.spool.sick:
            return disk_reply(None)
        if self.manager.free_space() < self.cfg.min_free_space + transaction.size:
            return Reply(452, "4.3.1", "Insufficient system storage")
        return None

    def _may_rcpt(self, connection: Connection, recipient: Recipient) -> Any:
        """None, a refusal, or WAIT while the primary is asked."""
        session, address, domain = connection.session, recipient.address, recipient.path.domain
        assert session.transaction is not None
        site = self.manager.scheduler.site(domain, self.now)
        cfg = site.cfg
        if self._is_full(domain, session.transaction.size):
            return queue_full(domain)
        is_postmaster = recipient.path.local.lower() == "postmaster"
        known: Optional[bool] = True
        if isinstance(cfg.recipients, frozenset) or cfg.recipients.startswith("file:"):
            if isinstance(cfg.recipients, str):
                known = address.lower() in self.recipient_files[cfg.recipients[5:]].addresses
            else:
                known = address.lower() in cfg.recipients
        elif cfg.recipients == "verify":
            known = self.manager.memory.knows(address, self.now.wall)
        if is_postmaster:
            return None                 # RFC 5321 4.5.1
        if known is False:
            return no_such_user(address)
        must_ask = known is None or (cfg.while_up == "defer" and not site.is_known_up(self.now))
        if not must_ask or not site.may_ask(self.now):
            return self._judge_rcpt(session, site, address, known)

        def on_word(word: str, text: str) -> None:
            if session.waiting is not None and connection in self.connections and not connection.is_closing:
                verdict = known if known is not None else {"good": True, "bad": False}.get(word)
                self._act(connection, session.resume(self._judge_rcpt(session, site, address, verdict, text)))
        self.manager.ask(site, address if known is None else "", on_word)
        return WAIT

    def _is_full(self, domain: str, octets: int) -> bool:
        site = self.manager.scheduler.site(domain, self.now)
        return site.cfg.max_queue_size is not None and site.octets + octets > site.cfg.max_queue_size

    def _judge_rcpt(self, session: Session, site: Site, address: str, known: Optional[bool], text: str = "") -> Optional[Reply]:
        """With all there is to know: None in `known` means that nobody can say now."""
        if known is False:
            return no_such_user(address, text)
        if known is None and site.cfg.unknown_recipients == "defer":
            return Reply(450, "4.1.1", "<%s>: Recipient cannot be verified now" % address)
        if site.cfg.while_up == "defer" and site.is_known_up(self.now):
            assert session.transaction is not None
            if not self.persistence.is_taken(session.address, session.transaction.sender, address, self.now.wall):
                return Reply(450, "4.3.2", "<%s>: The primary mail server is up, use that" % address)
        return None

    # -- the message on its way to the spool

    def _draft(self, connection: Connection, transaction: Transaction) -> Draft:
        if connection.draft is None:
            session = connection.session
            id = self.manager.ids.new()
            connection.draft = Draft(id, format_received(session, transaction, id, self.now.wall))
            self.log.write("smtpd", "%s: client=%s" % (id, format_peer(session.address, session.name)))
        return connection.draft

    def _keep(self, connection: Connection, body: Body) -> None:
        draft = self._draft(connection, body.transaction)
        if draft.error is None:
            draft.blocks.append(body.data)
            draft.pending += len(body.data)
            self._spill(connection, draft)

    def _share(self) -> int:
        """Octets of a body that one client may have in memory."""
        return max(UNWRITTEN_LEAST, min(UNWRITTEN_MAX, UNWRITTEN_TOTAL // max(1, len(self.connections))))

    def _spill(self, connection: Connection, draft: Draft) -> None:
        """Hand a large part of a body to a committer, one part at a time."""
        if draft.pending < min(SPILL_OCTETS, self._share()) or draft.busy:
            return
        blocks = draft.take()
        draft.busy = True

        def written(result: Any) -> None:
            draft.busy = False
            if isinstance(result, Exception) and draft.error is None:
                draft.error = OSError(errno.EIO, str(result))
            if connection.draft is not draft:
                return self._burn(draft)
            if draft.error is not None:
                draft.take()
            if connection.commit is not None:
                transaction, connection.commit = connection.commit, None
                self._submit(connection, draft, transaction)
            else:
                self._spill(connection, draft)
            self._look(connection)
        self.manager.committers.submit(Task(lambda spool: spool.append(draft, blocks)), written)

    def _discard(self, connection: Connection) -> None:
        draft, connection.draft, connection.commit = connection.draft, None, None
        if draft is not None and not draft.busy:
            self._burn(draft)

    def _burn(self, draft: Draft) -> None:
        if draft.fd >= 0:
            self.manager.committers.submit(Task(lambda spool: spool.discard(draft)), lambda result: None)

    def _commit(self, connection: Connection, transaction: Transaction) -> Any:
        for domain in {one.path.domain for one in transaction.recipients}:
            if self._is_full(domain, transaction.octets):       # SIZE was not declared, or too small
                self._discard(connection)
                return queue_full(domain)
        draft = self._draft(connection, transaction)
        draft.ended = self.now.mono
        if draft.busy:
            connection.commit = transaction
        else:
            self._submit(connection, draft, transaction)
        return WAIT

    def _submit(self, connection: Connection, draft: Draft, transaction: Transaction) -> None:
        """The end of the data is here: 250 waits until all of it is on stable storage."""
        session = connection.session
        recipients: Dict[str, Tuple[str, str, str, str, Time]] = {}
        for one in transaction.recipients:      # a recipient named twice gets it once
            expires = self.now.wall + self.manager.scheduler.config_of(one.path.domain).lifetime
            recipients.setdefault(one.address, (one.address, one.path.domain, one.notify, one.orcpt, expires))
        sidecar = make_sidecar(
            draft.id, "mail", transaction.sender, recipients.values(), self.now.wall,
            {"address": session.address, "helo": session.helo, "tls": session.tls},
            transaction.body, transaction.smtputf8, transaction.ret, transaction.envid)
        draft.busy = True

        def committed(error: Optional[Exception]) -> None:
            if error is None:
                self.manager.accept(sidecar, is_undecided=True)
                return self.manager.cut_through(sidecar, answer)
            self.log.write("smtpd", "%s: cannot be kept: %s" % (draft.id, printable(str(error))), "error")
            answer(disk_reply(error if isinstance(error, OSError) else None))

        def answer(refusal: Optional[Reply]) -> None:
            if refusal is None:
                self.acceptance.observe(self.now.mono - draft.ended)
            if connection.draft is draft:       # else the client has left; the message is queued all the same
                connection.draft = None
                connection.last = self.now.mono
                self._act(connection, session.resume(refusal or Reply(250, "2.0.0", "Ok: queued as %s" % draft.id)))
        self.manager.commit(draft, draft.take(), sidecar, committed)

    # -- once a second

    def _sweep(self) -> None:
        self._check_spool()
        self._check_recipients()
        if self.started is not None:
            self._note_history()
            if self.history.is_dirty and self.now.mono >= self.next_history:
                self._save_history()
        self._renew_certificate(self.certificate)
        limit = self.cfg.command_timeout
        if self.crowd > self.most * STRESS_SHARE:
            limit = min(limit, STRESS_TIMEOUT_S)
        for connection in list(self.connections):
            session = connection.session
            idle = self.now.mono - connection.last
            if connection.is_closing:
                if idle > LINGER_S:
                    self._drop(connection)
                continue
            in_data = session.mode in (Mode.DATA, Mode.CHUNK)
            if not in_data:
                connection.data_since = 0.0
            elif not connection.data_since:
                connection.data_since = self.now.mono
            if connection.tls in (Tls.ASKED, Tls.HANDSHAKE):
                if idle > min(limit, HANDSHAKE_S):
                    self._drop(connection)
                continue
            if session.waiting is not None:
                continue                # it is our turn
            came = session.transaction.received if session.transaction is not None else 0
            took = self.now.mono - connection.data_since if connection.data_since else 0.0
            slow = took > limit and came < took * DATA_RATE_MIN
            if idle > limit or slow:
                self.log.write("smtpd", "timeout after %s from %s" % (
                    "DATA" if in_data else session.stage.name, format_peer(session.address, session.name)))
                self._shut(connection, Reply(421, "4.4.2", "%s Error: timeout exceeded" % self.cfg.hostname))

    def _check_spool(self) -> None:
        """A sick spool is tried with a probe file until it is well."""
        if bool(self.spool.sick) != self.is_sick:
            self.is_sick = bool(self.spool.sick)
            if self.is_sick:
                self.log.write("master", "the spool is sick: %s; no new mail is taken, delivery goes on" % self.spool.sick,
                               "error")
            else:
                self.log.write("master", "the spool is well again")
        if not self.is_sick or self.is_healing:
            return
        self.is_healing = True

        def healed(result: Any) -> None:
            def again() -> None:
                self.is_healing = False
            self.manager.later(RETRY_DISK_S if result is not True else 0.0, again)
        self.manager.committers.submit(Task(lambda spool: spool.heal()), healed)

    # -- commands

    def _on_control(self, mask: int) -> None:
        assert self.control is not None
        try:
            sock, _ = self.control.accept()
        except OSError as error:
            if error.errno in ACCEPT_ERRORS:
                if self.reserve < 0:
                    self._listen_later(self.control)
                else:                   # for whoever finds out why, rather than for one more client
                    os.close(self.reserve)
                    self.reserve = -1
            return
        sock.setblocking(False)
        controller = Controller(sock)
        self.controllers.add(controller)
        self.selector.register(sock, selectors.EVENT_READ, lambda mask: self._on_controller(controller, mask))

    def _on_controller(self, controller: Controller, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            return self._answer(controller)
        try:
            data = controller.sock.recv(4096)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        controller.data += data
        if not data or len(controller.data) > 65536:
            return self._end_controller(controller)
        if controller.answers is None and b"\n" in controller.data:
            try:
                request = json.loads(controller.data)
                controller.answers = self.command(request if isinstance(request, dict) else {})
            except (ValueError, RecursionError):
                return self._end_controller(controller)
            self._answer(controller)

    def command(self, request: Mapping[str, Any]) -> Answers:
        return run_command(self.manager, request, self.crowd, self.started)

    def _answer(self, controller: Controller) -> None:
        """Let a command go on as far as it can, and send what it says."""
        is_waiting = False
        while controller.answers is not None and len(controller.out) < OUTPUT_MAX and not is_waiting:
            answer = next(controller.answers, {})
            is_waiting = answer is None
            if answer:
                controller.out += json.dumps(answer, separators=(",", ":")).encode("ascii") + b"\n"
            if answer is not None and (not answer or "exit" in answer):
                controller.answers = None
        try:
            if controller.out:
                del controller.out[:controller.sock.send(controller.out)]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            return self._end_controller(controller)
        if controller.answers is None and not controller.out:
            return self._end_controller(controller)
        goes_on = bool(controller.out) or not is_waiting        # as soon as the client has room for it
        self.selector.modify(controller.sock, selectors.EVENT_READ | selectors.EVENT_WRITE * goes_on,
                             lambda mask: self._on_controller(controller, mask))

    def _end_controller(self, controller: Controller) -> None:
        if controller in self.controllers:
            self.controllers.discard(controller)
            self.selector.unregister(controller.sock)
            controller.sock.close()
            if controller.answers is not None:
                controller.answers.close()      # type: ignore[attr-defined]

    # -- without a running relay

    def run_offline(self, request: Mapping[str, Any]) -> Iterator[Dict[str, Any]]:
        """A command on a spool that no relay holds; the caller has its lock.
        Connections are made for --flush alone, to the sites it means."""
        flushed = self.manager.is_offline = request.get("command") == "flush"
        self.manager.load_state()
        self.manager.load()
        self.manager.may_connect = lambda site: flushed and bool(self.manager.watches) and any(
            site.name == name for watch in self.manager.watches for name, _ in watch.left)
        answers = self.command(request)
        last: Dict[str, Any] = {}
        while "exit" not in last:
            answer = next(answers)
            if answer is not None:
                last = answer
                yield answer
            else:
                self._turn(min(self._pause(), COMMAND_POLL_S))
        if flushed:
            self.manager.keep_attempts()
        self.manager.stop()
        end = self.now.mono + STOP_S
        while (self.manager.couriers or self.manager.chains) and self.now.mono < end:
            self._turn(COMMAND_POLL_S)
        self._close()


WAIT = object()                 # the answer to a question comes later


def queue_full(domain: str) -> Reply:
    return Reply(452, "4.2.2", "The queue for %s is full" % domain)


def no_such_user(address: str, text: str = "") -> Reply:
    """`text`: the primary's own words, when it was asked just now."""
    return Reply(550, "5.1.1", "<%s>: Recipient address rejected: User unknown%s" % (
        address, " (%s)" % printable(text, REPLY_PART_MAX) if text else ""))


def short_path(path: str, directory: int) -> str:
    """A Unix socket's path has about a hundred octets; a longer one goes by the open directory."""
    if len(os.fsencode(path)) < 100:
        return path
    return "/proc/self/fd/%d/%s" % (directory, os.path.basename(path))


def read_config(file: str) -> Config:
    """Raises ConfigError; OSError when it cannot be read."""
    with open(file, "rb") as stream:
        data = stream.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(file, data[:error.start].count(b"\n") + 1, "not UTF-8") from None
    cfg = parse_config(text, file, "")
    return cfg if cfg.hostname else dataclasses.replace(cfg, hostname=fully_qualified_name())


def fully_qualified_name() -> str:
    """The machine's own; this may ask the DNS and wait for it, so that only those ask who have no `hostname`."""
    try:
        return parse_domain(socket.getfqdn())
    except ValueError:
        return "localhost"


# == 16. MAIN ==================================================================
# Arguments, commands, signals, exit status.

class Usage(Exception):
    """Something is wrong with the command line."""


class Parser(argparse.ArgumentParser):
    """Exit status 64 instead of argparse's 2, and our own help page."""

    def error(self, message: str) -> Any:
        raise Usage(message)

    def format_help(self) -> str:
        return (__doc__ or "").partition("\nQUEUE\n")[0].rstrip() + "\n"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="etrn_relay.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE")
    parser.add_argument("-h", "--help", action="store_true")
    for option in ("--version", "--json", "--no-wait", "--raw", "--yes"):
        parser.add_argument(option, action="store_true")
    commands = parser.add_mutually_exclusive_group()
    for name in ("check", "demo", "status"):
        commands.add_argument("--" + name, action="store_true")
    commands.add_argument("--probe", metavar="DOMAIN")
    commands.add_argument("--print-unit", choices=sorted(UNITS))
    commands.add_argument("--queue", nargs="?", const="all", metavar="DOMAIN")
    commands.add_argument("--show", metavar="ID")
    commands.add_argument("--export", metavar="DOMAIN")
    commands.add_argument("--flush", metavar="DOMAIN|@DOMAIN|all")
    for name in ENDINGS:
        commands.add_argument("--" + name, metavar="ID|DOMAIN|all")
    given = parser.parse_args(argv)
    for name, value in vars(given).items():
        if value == "":                 # of an unset variable in a script; it must not start a relay
            raise Usage("argument --%s: is empty" % name)
    if given.no_wait and not given.flush:
        raise Usage("--no-wait goes with --flush")
    if given.raw and not given.show:
        raise Usage("--raw goes with --show")
    if given.yes and not (given.delete or given.bounce):
        raise Usage("--yes goes with --delete or --bounce")
    if given.json and not (given.check or given.status or given.queue or given.show or given.flush or given.probe):
        raise Usage("--json goes with --check, --flush, --probe, --queue, --show or --status")
    return given


ENDINGS = {"hold": "held", "release": "released", "delete": "deleted", "bounce": "returned to their senders"}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status."""
    try:
        given = parse_arguments(sys.argv[1:] if argv is None else argv)
    except Usage as error:
        print("etrn_relay.py: %s\nTry --help." % error, file=sys.stderr)
        return EX_USAGE
    try:
        if given.help:
            print(Parser().format_help(), end="")
            return EX_OK
        if given.version:
            print("etrn_relay %s" % __version__)
            return EX_OK
        if given.demo:
            return Demo(print).play()
        if given.print_unit:
            print(format_unit(given.print_unit, find_config(given.config)), end="")
            return EX_OK
        return run_given(given, open_config(given.config))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EX_CONFIG
    except Usage as error:
        print("etrn_relay.py: %s" % error, file=sys.stderr)
        return EX_USAGE
    except SpoolBusy as error:
        print("etrn_relay.py: %s" % error, file=sys.stderr)
        return EX_TEMPFAIL
    except BrokenPipeError:             # the reader of our output has left
        sys.stderr.close()
        return EX_OK
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OSError as error:
        print("etrn_relay.py: %s" % describe(error), file=sys.stderr)
        return EX_TEMPFAIL if error.errno in DISK_ERRORS else EX_CONFIG


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def find_config(given: Optional[str]) -> str:
    """--config, $ETRN_RELAY_CONFIG, ./etrn.conf, /etc/etrn.conf."""
    if given or os.environ.get("ETRN_RELAY_CONFIG"):
        return given or os.environ["ETRN_RELAY_CONFIG"]
    return "etrn.conf" if os.path.exists("etrn.conf") else "/etc/etrn.conf"


def open_config(given: Optional[str]) -> Config:
    """Raises ConfigError and OSError; where no file was named and none is there, one that helps."""
    try:
        return read_config(find_config(given))
    except FileNotFoundError:
        if given or os.environ.get("ETRN_RELAY_CONFIG"):
            raise
        raise OSError(0, "no configuration: neither ./etrn.conf nor /etc/etrn.conf exists; "
                      "name one with --config, or see --demo") from None


def run_given(given: argparse.Namespace, cfg: Config) -> int:
    if given.check:
        return check(cfg, given.json)
    if given.probe:
        return probe(cfg, given.probe, given.json)
    if given.status:
        return show_status(cfg, given.json)
    if given.queue:
        return show_queue(cfg, parse_what(given.queue), given.json)
    if given.show:
        return show_message(cfg, given.show.upper(), given.json, given.raw)
    if given.export:
        return export(cfg, parse_what(given.export))
    if given.flush:
        return flush(cfg, parse_what(given.flush), not given.no_wait, given.json)
    for name in ENDINGS:
        if getattr(given, name):
            return change_queue(cfg, name, parse_what(getattr(given, name)), given.yes)
    return serve(cfg)


def parse_what(text: str) -> str:
    """all, an ID in upper case, a domain, or @domain.  Raises Usage."""
    if text.lower() == "all" or _ID.fullmatch(text.upper()):
        return text.lower() if text.lower() == "all" else text.upper()
    try:
        return "@" + parse_domain(text[1:]) if text[:1] == "@" else parse_domain(text)
    except ValueError:
        raise Usage("'%s' is neither a domain, a queue ID, nor all" % printable(text, 100)) from None


class Account:
    """The `user` option.  The spool and the log are opened as that user, ports
    are bound and the TLS key is read as root, and then root is given up for good."""

    def __init__(self, name: str) -> None:
        """Raises OSError when it cannot work."""
        self.name = name
        if not name:
            return
        try:
            found = pwd.getpwnam(name)
        except KeyError:
            raise OSError(0, "user = %s: there is no such account" % name) from None
        self.uid, self.gid, self.home = found.pw_uid, found.pw_gid, found.pw_dir
        if os.geteuid() not in (0, self.uid):
            raise OSError(0, "user = %s: only root can become another account" % name)
        self.name = name if os.geteuid() == 0 and self.uid != 0 else ""

    def assume(self, spool: str) -> None:
        """For the opening of spool and log; a spool that does not exist yet is made for the account."""
        if self.name:
            if not os.path.isdir(spool):
                os.makedirs(spool, 0o700)
                os.chown(spool, self.uid, self.gid)
            os.initgroups(self.name, self.gid)
            os.setegid(self.gid)
            os.seteuid(self.uid)
            if not os.access(spool, os.R_OK | os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
                raise OSError(0, "user = %s: that account cannot write the spool %s" % (self.name, spool))

    def resume_root(self) -> None:
        if self.name:
            os.seteuid(0)
            os.setegid(os.getgid())

    def become(self) -> None:
        if self.name:
            self.resume_root()
            os.setgid(self.gid)
            os.setuid(self.uid)


LEAN_START = """\
import sys
sys.path[:] = [folder for folder in sys.path if folder]     # not from the current folder, as -c would
import importlib.machinery, importlib.util
loader = importlib.machinery.SourceFileLoader("etrn_relay", sys.argv.pop(1))
module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
sys.modules[loader.name] = module
loader.exec_module(module)
sys.exit(module.main())"""


def start_lean() -> None:
    """CPython from 3.9 on keeps the syntax tree of its main script for the life
    of the process: 17 MB, more than the relay itself.  So the same process
    starts once more, with this file as a module.  On failure it goes on as it is."""
    if __name__ == "__main__" and sys.version_info >= (3, 9) and sys.executable:
        flags: List[str] = getattr(subprocess, "_args_from_interpreter_flags", list)()      # no public function tells them
        try:
            os.execv(sys.executable, [sys.executable, *flags, "-B", "-c", LEAN_START, os.path.abspath(__file__), *sys.argv[1:]])
        except OSError:
            pass


def serve(cfg: Config) -> int:
    """Run the relay in the foreground."""
    for number in (signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)       # until there is something to reread; it outlives the new start
    start_lean()
    supervisor = Supervisor(os.environ)
    account = Account(cfg.user)
    account.assume(cfg.spool)
    spool = Spool(cfg.spool)
    spool.open()
    release_memory()
    gc.freeze()                         # the collector leaves alone what is there now, so that it stays shared with the clerk
    clerk: Optional[Clerk] = None
    problem = ""
    try:
        clerk = Clerk(spool, account.become)    # before there is a thread, or a file that it should not have
    except OSError as error:
        problem = describe(error)
    log = Log(cfg.log, cfg.log_level, cfg.hostname)
    server = Server(cfg, spool, log)
    server.manager.committers.clerk = clerk
    if problem:
        log.write("master", "no process to write the spool: %s; the relay writes itself" % problem, "warning")
    server.supervisor = supervisor
    server.load_recipients()
    server.load_logins()
    read_secret(cfg.bounces_password)       # at each login, too; a wrong path is said now
    account.resume_root()
    server.set_certificate(server.load_certificate())
    try:
        server.adopt(supervisor.sockets())
        server.listen()
        server.open_page()
    except OSError as error:
        hint = "  (ports below 1024 need root)" if error.errno == errno.EACCES else ""
        print("etrn_relay.py: %s%s" % (describe(error), hint), file=sys.stderr)
        return EX_TEMPFAIL if error.errno == errno.EADDRINUSE else EX_CONFIG
    account.become()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: server.signals.append(number))
    signal.set_wakeup_fd(server.wake_writer.fileno(), warn_on_full_buffer=False)
    release_memory()
    try:
        server.run()
    finally:
        signal.set_wakeup_fd(-1)
        spool.close()
    return EX_OK


# -- commands

def ask_relay(cfg: Config, request: Mapping[str, Any]) -> Iterator[Dict[str, Any]]:
    """The answers to a command: of the running relay, or, where none runs, of
    the spool itself under its lock.  The last one has "exit"."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    directory = -1
    try:
        directory = os.open(cfg.spool, os.O_RDONLY | os.O_CLOEXEC)
        sock.connect(short_path(os.path.join(cfg.spool, "control"), directory))
        sock.sendall(json.dumps(request).encode("ascii") + b"\n")
    except PermissionError as error:
        yield {"error": "may not talk to the relay: %s" % describe(error), "exit": EX_UNAVAILABLE}
        return
    except OSError:
        yield from ask_spool(cfg, request)
        return
    finally:
        if directory >= 0:
            os.close(directory)
    with sock, sock.makefile("rb") as lines:
        for line in lines:
            answer = json.loads(line)
            yield answer
            if "exit" in answer:
                return
    yield {"error": "the relay broke off", "exit": EX_UNAVAILABLE}


def ask_spool(cfg: Config, request: Mapping[str, Any]) -> Iterator[Dict[str, Any]]:
    """Where no relay runs.  A spool that does not exist yet is an empty one."""
    if not os.path.isdir(cfg.spool):
        with tempfile.TemporaryDirectory(prefix="etrn-empty-") as folder:
            yield from ask_spool(dataclasses.replace(cfg, spool=folder, user=""), request)
        return
    account = Account(cfg.user)
    account.assume(cfg.spool)           # what root would write there the relay could not read
    spool = Spool(cfg.spool)
    try:
        spool.open()
        log = Log(cfg.log, "warning" if cfg.log == "stderr" else cfg.log_level, cfg.hostname)
        yield from Server(cfg, spool, log).run_offline(request)
    finally:
        spool.close()
        account.resume_root()


def say_error(answer: Mapping[str, Any], as_json: bool = False) -> int:
    if answer.get("error"):
        print("etrn_relay.py: %s" % answer["error"], file=sys.stderr)
    return int(answer["exit"])


def last_answer(cfg: Config, request: Mapping[str, Any]) -> Dict[str, Any]:
    return list(ask_relay(cfg, request))[-1]


def find_style() -> Style:
    """As wide as the terminal, and coloured on one; not with NO_COLOR (no-color.org) or TERM=dumb."""
    if not sys.stdout.isatty():
        return PLAIN
    return Style(shutil.get_terminal_size().columns, not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb")


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=True))


def show_status(cfg: Config, as_json: bool) -> int:
    answer = last_answer(cfg, {"command": "status"})
    code = say_error(answer)
    if "spool" in answer:
        del answer["exit"]
        if as_json:
            print_json(public_status(answer))
        else:
            print(format_status(answer, time.time(), find_style()), end="")
    return code


def show_queue(cfg: Config, what: str, as_json: bool) -> int:
    gc.disable()                        # a hundred thousand rows and no cycle among them
    try:
        return _show_queue(cfg, what, as_json)
    finally:
        gc.enable()


def _show_queue(cfg: Config, what: str, as_json: bool) -> int:
    rows: List[Dict[str, Any]] = []
    spool = Spool(cfg.spool)
    answer: Dict[str, Any] = {}
    for answer in ask_relay(cfg, {"command": "list", "what": what}):
        for id, state, due, expires, failures in answer.get("rows", ()):
            try:
                rows += queue_rows(spool.peek_sidecar(id), answer, state, due, expires, failures)
            except (Corrupt, OSError, KeyError, TypeError):
                continue                # delivered since, or somebody's own work
    code = say_error(answer)
    if code == EX_OK:
        rows.sort(key=operator.itemgetter("received", "id"))
        if as_json:
            print_json(rows)
        else:
            print(format_queue(rows, time.time(), find_style()), end="")
    return code


def queue_rows(sidecar: Mapping[str, Any], site: Mapping[str, Any], state: str, due: Optional[Time], expires: Time,
               failures: int) -> Iterator[Dict[str, Any]]:
    """A message as --queue lists it: the sidecar, and what the relay knows since.  Attempts
    to reach a primary that is down are counted there, not written to each sidecar."""
    name, error, is_all = site["site"], site["error"], site["notices"]
    mine = [one for one in sidecar["recipients"] if one["state"] == QUEUED and (is_all or one["domain"] == name)]
    if mine:
        yield {"id": sidecar["id"], "domain": mine[0]["domain"], "state": state, "sender": sidecar["sender"],
               "size": sidecar["size"], "received": sidecar["received"], "expires": expires, "next_attempt": due,
               "client": sidecar["client"], "recipients": [
                   {"address": one["address"], "attempts": one["attempts"] + failures,
                    "last_response": error if error and (failures or not one["last_response"]) else one["last_response"]}
                   for one in mine]}


def show_message(cfg: Config, id: str, as_json: bool, raw: bool) -> int:
    spool = Spool(cfg.spool)
    try:
        if not _ID.fullmatch(id):
            raise Corrupt("no queue ID looks like this")
        sidecar = spool.read_sidecar(id)
        if raw:
            message = spool.read_message(id, sidecar)
            for block in message.blocks():
                sys.stdout.buffer.write(block)
            message.close()
            sys.stdout.buffer.flush()
        else:
            sidecar = with_news(cfg, sidecar)
            header = spool.read_header(id)
            if as_json:
                print_json(dict(sidecar, header=header.decode("utf-8", "replace")))
            else:
                print(format_envelope(sidecar, header, time.time(), find_style()), end="")
    except Corrupt as error:
        why = str(error) if _ID.fullmatch(id) and spool.has_sidecar(id) else "no such message"
        print("etrn_relay.py: %s: %s" % (printable(id, 40), why), file=sys.stderr)
        return EX_MISSING
    return EX_OK


def with_news(cfg: Config, sidecar: Dict[str, Any]) -> Dict[str, Any]:
    """The sidecar, with what the running relay knows since: attempts that failed
    before a recipient was named, and their error, as --queue counts them."""
    if not is_running(cfg):
        return sidecar
    news: Dict[str, Dict[str, Any]] = {}
    for answer in ask_relay(cfg, {"command": "list", "what": sidecar["id"]}):
        for _, state, due, expires, failures in answer.get("rows", ()):
            for row in queue_rows(sidecar, answer, state, due, expires, failures):
                news.update((one["address"], one) for one in row["recipients"])
    return dict(sidecar, recipients=[
        dict(one, **news.get(one["address"], {})) if one["state"] == QUEUED else one for one in sidecar["recipients"]])


def export(cfg: Config, what: str) -> int:
    """The queued messages of a domain as mbox on standard output; they stay queued."""
    def is_meant(domain: str) -> bool:
        return what in (domain, "all") or (what[:1] == "@" and is_below(domain, what[1:]))
    spool = Spool(cfg.spool)
    count, left_out = 0, False
    for id in sorted(spool.names()) if os.path.isdir(cfg.spool) else []:
        try:
            sidecar = spool.read_sidecar(id)
            if not any(one["state"] == QUEUED and is_meant(one["domain"]) for one in sidecar["recipients"]):
                continue
            message = spool.read_message(id, sidecar)
            text = format_mbox(sidecar, b"".join(message.blocks()), is_meant)
            message.close()
        except (Corrupt, OSError) as error:
            if spool.has_sidecar(id):
                print("etrn_relay.py: %s: left out: %s" % (id, error), file=sys.stderr)
                left_out = True
            continue
        sys.stdout.buffer.write(text)   # what fails here ends the command: who trusts the file may delete the queue
        count += 1
    sys.stdout.buffer.flush()
    if not count and what != "all" and not Scheduler(cfg).serves(what):
        print("etrn_relay.py: %s: no such domain here" % what, file=sys.stderr)
        return EX_MISSING
    return EX_TEMPFAIL if left_out else EX_OK


def flush(cfg: Config, what: str, wait: bool, as_json: bool) -> int:
    is_terminal = sys.stdout.isatty() and not as_json
    answer: Dict[str, Any] = {}
    for answer in ask_relay(cfg, {"command": "flush", "what": what, "wait": wait}):
        if is_terminal and "left" in answer:
            print("\r" + format_progress(answer["total"], answer["left"]), end="", flush=True)
    if is_terminal and answer.get("queued") and wait:
        print("\r" + format_progress(answer["queued"], answer["waiting"]))
    code = say_error(answer)
    if as_json:
        print_json({key: value for key, value in answer.items() if key != "exit"})
    elif "queued" in answer:
        print("%s: %s" % (what, format_flush(answer, wait)))
    return code


def format_flush(answer: Mapping[str, Any], waited: bool) -> str:
    held = ", %s not touched" % plural(answer["held"], "held message") if answer["held"] else ""
    if not answer["queued"]:
        return "nothing is queued" + held
    if not waited:
        return "delivery of %s started%s" % (plural(answer["queued"], "message"), held)
    return "%d delivered, %d returned, %d still waiting%s%s" % (
        answer["delivered"], answer["bounced"] + answer["expired"], answer["waiting"], held,
        ": " + printable(answer["reason"]) if answer["waiting"] and answer["reason"] else "")


def change_queue(cfg: Config, command: str, what: str, yes: bool) -> int:
    """--hold, --release, --delete, --bounce."""
    if what == "all" and command in ("delete", "bounce") and not yes:
        question, reply = "Really %s all queued mail? [y/N] " % command, ""
        if sys.stdin is not None and sys.stdin.isatty():
            print(question, end="", flush=True)
            reply = sys.stdin.readline()
        elif sys.stdin is not None:     # a script that answers, or nobody
            reply = sys.stdin.readline()
            if not reply:
                raise Usage("--%s all needs --yes" % command)
            print(question + reply.strip())
        if reply.strip().lower() not in ("y", "yes"):
            print("Nothing was done.")
            return EX_OK
    answer = last_answer(cfg, {"command": command, "what": what})
    code = say_error(answer)
    if "count" in answer:
        busy = "; %d left alone, in delivery at this moment" % answer["busy"] if answer.get("busy") else ""
        print("%s: %s %s%s" % (what, plural(answer["count"], "message"), ENDINGS[command], busy))
    return code


# -- --probe

def in_time(seconds: float, tasks: Sequence[Callable[[], Any]]) -> List[Any]:
    """What the tasks return, run beside each other.  In its place, the exception
    of one that failed; of one that did not end in time, a TimeoutError, and its
    thread is left to its own deadlines."""
    results: List[Any] = [TimeoutError("no answer within %d s" % seconds) for _ in tasks]
    todo: "queue.SimpleQueue[Tuple[int, Callable[[], Any]]]" = queue.SimpleQueue()
    for pair in enumerate(tasks):
        todo.put(pair)

    def work() -> None:
        while True:
            try:
                number, task = todo.get_nowait()
            except queue.Empty:
                return
            try:
                results[number] = task()
            except Exception as error:
                results[number] = error
    end = time.monotonic() + seconds
    threads = [threading.Thread(target=work, daemon=True) for _ in tasks[:CHECK_THREADS]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return list(results)


class Remembering(Resolver):
    """Asks nothing twice, so that a route can be explained in the terms it was found in."""

    def __init__(self, nameservers: Union[str, Tuple[Endpoint, ...]]) -> None:
        super().__init__(nameservers)
        self.known: Dict[Tuple[str, int], Any] = {}

    def _once(self, key: Tuple[str, int], ask: Callable[[], List[Any]]) -> List[Any]:
        if key not in self.known:
            try:
                self.known[key] = ask()
            except DnsError as error:
                self.known[key] = error
        if isinstance(self.known[key], DnsError):
            raise self.known[key]
        return list(self.known[key])

    def query(self, name: str, kind: int, seconds: Optional[float] = None) -> List[Any]:
        return self._once((name, kind), lambda: super(Remembering, self).query(name, kind, seconds))

    def addresses(self, host: str) -> List[str]:
        return self._once((host, 0), lambda: super(Remembering, self).addresses(host))


def explain_route(plan: Plan) -> Dict[str, Any]:
    """The hosts a delivery would try, and why it would not try the others."""
    hops: List[Hop] = []
    found: Dict[str, Any] = {"hops": hops, "records": [], "warning": None, "error": None}
    try:
        route, warning = find_route(plan)
        hops += route
        found["warning"] = warning or None
    except PeerError as error:
        found["error"] = str(error)
    if plan.primary == "mx":
        try:
            named = [(preference, host, SMTP_PORT) for preference, host in sorted(plan.resolver.query(plan.site, MX))]
        except DnsError:
            named = []
    else:
        named = [(None, where.host, where.port) for where in plan.primary if isinstance(where, Endpoint)]
    cut = min((preference for preference, host, _ in named if host == plan.hostname and preference is not None), default=65536)
    is_looped = False
    for preference, host, port in named:
        why, addresses = "", []
        try:
            addresses = plan.resolver.addresses(host) if host else []
        except DnsError as error:
            why = str(error)
        if not host:
            why = "a null MX: the domain says that it takes no mail"
        elif any(hop.host == host for hop in hops):
            why = ""
        elif host == plan.hostname:
            why = "this host itself"
        elif (preference or 0) >= cut:
            why = "no better than this host"
        elif any(is_own(Hop(host, address, port), plan.listeners) for address in addresses):
            why, is_looped = "it leads back to this relay", True
        elif is_looped:
            why = "behind a host that leads back to this relay"
        found["records"].append({"preference": preference, "host": host, "addresses": addresses, "why_not": why or None})
    return found


class ProbeClient(Client):
    """Keeps what it was told, and ends as a whole when its time is over."""

    def __init__(self, hostname: str, until: float) -> None:
        super().__init__(hostname)
        self.until = until              # monotonic
        self.replies: List[str] = []

    def wait(self, seconds: float) -> None:
        super().wait(min(seconds, PROBE_REPLY_S, self.until - time.monotonic()))

    def getreply(self) -> Tuple[int, bytes]:
        code, text = super().getreply()
        self.replies.append(reply_text(code, text))
        return code, text


class Visit:
    """One host of a route, talked to as a delivery would, but nothing is sent.
    Whatever `tls` says, its certificate is looked at."""

    def __init__(self, plan: Plan, hop: Hop, until: float, recipient: str = "") -> None:
        self.plan = plan
        self.hop = hop
        self.until = until              # monotonic
        self.recipient = recipient      # empty: whom the host would take mail for is not asked
        self.clients: List[ProbeClient] = []
        self.found: Dict[str, Any] = {
            "host": hop.host, "address": hop.address, "port": hop.port, "connect_seconds": None, "greeting": None,
            "extensions": {}, "size": None, "tls": None, "mail": None, "rcpt": None, "takes_mail": False, "error": None}

    def run(self) -> Dict[str, Any]:
        try:
            self._walk()
        except (PeerError, smtplib.SMTPException, OSError, ValueError) as error:
            self.found["error"] = printable(str(error))
        for client in self.clients:
            client.close()
        return self.found

    def _open(self) -> ProbeClient:
        client = ProbeClient(self.plan.hostname, self.until)
        self.clients.append(client)
        began = time.monotonic()
        try:
            sock = socket.create_connection((self.hop.address, self.hop.port), max(0.01, min(PROBE_REPLY_S, self.until - began)))
        except OSError as error:
            raise PeerError("connect to %s: %s" % (str(self.hop), error.strerror or error)) from None
        if self.found["connect_seconds"] is None:
            self.found["connect_seconds"] = round(time.monotonic() - began, 4)
        try:
            client.open(self.hop, sock)
        finally:
            self.found["greeting"] = self.found["greeting"] or (client.replies[0] if client.replies else None)
        client.hello()
        self._note_extensions(client)
        return client

    def _note_extensions(self, client: ProbeClient) -> None:
        """What TLS changes is added to what was offered in the clear."""
        offered = {name.upper(): text.strip() for name, text in client.esmtp_features.items()}
        self.found["extensions"].update(offered)
        if re.fullmatch(r"[0-9]{1,20}", offered.get("SIZE", "")):
            self.found["size"] = int(offered["SIZE"])

    def _walk(self) -> None:
        policy = self.plan.cfg.tls
        client = self._open()
        is_offered = "starttls" in client.esmtp_features and ssl is not None
        if is_offered:
            client = self._look_at_tls(client)
        tls = self.found["tls"] or {}
        if not tls.get("protocol"):
            if policy not in ("none", "may"):
                raise PeerError(tls.get("error") or "%s does not offer STARTTLS, and tls = %s" % (
                    self.hop.host, policy.partition(":")[0]))
        elif policy == "none":
            self._leave(client)
            client = self._open()
        elif policy == "verify" and not tls["verified"]:
            raise PeerError(tls["error"])
        else:
            client.check_pin(policy)
        self.found["takes_mail"] = bool(self.recipient) and self._ask(client)
        self._leave(client)

    def _look_at_tls(self, client: ProbeClient) -> ProbeClient:
        """First as strictly as can be, then as most servers do; each failure costs the
        connection.  Returns one that is greeted: in TLS, or in the clear where that fails."""
        tls: Dict[str, Any] = {"protocol": None, "cipher": None, "verified": False, "error": None, "subject": None,
                               "issuer": None, "names": [], "not_before": None, "not_after": None, "sha256": None}
        self.found["tls"] = tls
        for policy in ("verify", "require"):
            try:
                client.secure(policy)
            except TlsError as error:
                tls["error"] = tls["error"] or re.sub(r" \(_ssl\.c:\d+\)", "", str(error))
                client = self._open()
                continue
            assert isinstance(client.sock, ssl.SSLSocket)
            self._note_extensions(client)
            der, cipher = client.sock.getpeercert(binary_form=True) or b"", client.sock.cipher()
            tls.update(protocol=client.sock.version(), cipher=cipher[0] if cipher else None, verified=policy == "verify",
                       sha256=hashlib.sha256(der).hexdigest())
            try:
                facts = parse_certificate(der)
                tls.update(subject=facts.subject, issuer=facts.issuer, names=list(facts.names), not_before=facts.since,
                           not_after=facts.until)
            except ValueError:
                pass                    # the handshake took it; only its description is missing
            break
        return client

    def _ask(self, client: ProbeClient) -> bool:
        lines = {"mail": "MAIL FROM:<>", "rcpt": "RCPT TO:<%s>" % self.recipient}
        for name, line in lines.items():
            client.write(line.encode("ascii") + b"\r\n", PROBE_REPLY_S)
            client.wait(COMMAND_S)
            code, _ = client.getreply()
            self.found[name] = client.replies[-1]
            if code // 100 != 2:
                return False
        return True

    @staticmethod
    def _leave(client: ProbeClient) -> None:
        try:
            client.wait(2.0)
            client.docmd("RSET")
            client.docmd("QUIT")
        except (PeerError, smtplib.SMTPException, OSError):
            pass                        # everything of interest was said before


def remembered_route(cfg: Config, name: str, one: DomainConfig) -> Tuple[Hop, ...]:
    """The route that worked last, as the relay wrote it down."""
    known = Spool(cfg.spool).load_state().get("sites", {})
    return tuple(parse_known_route(known.get(name), one.primary)) if isinstance(known, dict) else ()


def probe_plan(cfg: Config, name: str, one: DomainConfig, resolver: Resolver) -> Plan:
    listeners = tuple(cfg.listen) + tuple(cfg.odmr_listen)
    return Plan(name, one, one.primary, cfg.hostname, resolver, listeners, remembered_route(cfg, name, one))


def probe(cfg: Config, what: str, as_json: bool) -> int:
    """Walk a domain's route as a mail admin would.  Nothing is sent, and no lock is needed."""
    try:
        name = parse_domain(what)
    except ValueError:
        raise Usage("'%s' is not a domain" % printable(what, 100)) from None
    one = cfg.domain(name)
    if one is None:
        if as_json:
            print_json({"domain": name, "served": False})
        print("etrn_relay.py: %s: no such domain here" % name, file=sys.stderr)
        return EX_MISSING
    found = walk_route(cfg, name, one)
    if as_json:
        print_json(found)
    else:
        print(format_probe(found), end="")
    if any(host["takes_mail"] for host in found["hosts"]):
        return EX_OK
    return EX_TEMPFAIL if any(host["mail"] for host in found["hosts"]) else EX_UNAVAILABLE


def walk_route(cfg: Config, name: str, one: DomainConfig) -> Dict[str, Any]:
    """The route, then all its hosts beside each other."""
    primary = one.primary if isinstance(one.primary, str) else [str(where) for where in one.primary]
    found: Dict[str, Any] = {"domain": name, "served": True, "primary": primary, "tls_policy": one.tls.partition(":")[0],
                             "records": [], "warning": None, "error": None, "hosts": []}
    if primary in ("atrn", "etrn"):
        found["error"] = "mail waits until its server asks for it; there is no host to probe"
        return found
    plan = probe_plan(cfg, name, one, Remembering(cfg.nameservers))
    route = in_time(PROBE_ROUTE_S, [lambda: explain_route(plan)])[0]
    if isinstance(route, TimeoutError):
        route = {"hops": [], "error": "DNS: %s" % route}
    elif isinstance(route, Exception):
        raise route                     # a bug: nothing else comes out of there
    hops = route.pop("hops")
    found.update(route)
    until = time.monotonic() + PROBE_HOSTS_S
    visits = [Visit(plan, hop, until, "postmaster@" + name) for hop in hops]
    for visit, result in zip(visits, in_time(PROBE_HOSTS_S, [visit.run for visit in visits])):
        found["hosts"].append(dict(visit.found, error=str(result)) if isinstance(result, Exception) else result)
    return found


def format_day(at: Optional[Time]) -> str:
    try:
        return time.strftime("%Y-%m-%d", time.gmtime(at)) if at is not None else "?"
    except (OverflowError, ValueError, OSError):
        return "beyond this machine's calendar"


def format_probe(found: Mapping[str, Any]) -> str:
    """For people; what comes from outside was through printable(), or goes through it here."""
    primary = found["primary"] if isinstance(found["primary"], str) else ", ".join(found["primary"])
    lines = ["%s: primary = %s, tls = %s" % (found["domain"], primary, found["tls_policy"])]
    for record in found["records"]:
        rank = "%5s " % record["preference"] if record["preference"] is not None else "  "
        lines.append("%s%s  %s%s" % (rank, printable(record["host"]) or ".", ", ".join(record["addresses"]) or "no address",
                                     "  (not used: %s)" % printable(record["why_not"]) if record["why_not"] else ""))
    lines += ["  %s: %s" % (name, printable(found[name])) for name in ("warning", "error") if found[name]]
    for host in found["hosts"]:
        lines += ["", str(Hop(printable(host["host"]), host["address"], host["port"]))]
        lines += ["  " + line for line in _probe_lines(host, found["domain"])]
    return "\n".join(lines) + "\n"


def _probe_lines(host: Mapping[str, Any], domain: str) -> Iterator[str]:
    if host["connect_seconds"] is not None:
        yield "connected in %.0f ms" % (host["connect_seconds"] * 1000)
    if host["greeting"]:
        yield "greeting: %s" % host["greeting"]
    if host["extensions"]:
        yield "EHLO: %s" % printable(", ".join(" ".join(filter(None, pair)) for pair in sorted(host["extensions"].items())))
    if host["size"]:
        yield "SIZE: messages up to %s" % format_size(host["size"])
    tls = host["tls"]
    if tls and tls["protocol"]:
        yield "TLS: %s, %s" % (tls["protocol"], tls["cipher"])
        yield "certificate: %s; for %s; by %s; %s to %s" % (
            printable(tls["subject"] or "no subject"), printable(", ".join(tls["names"]) or "no name"),
            printable(tls["issuer"] or "?"), format_day(tls["not_before"]), format_day(tls["not_after"]))
        yield "certificate: sha256:%s" % tls["sha256"]
        yield "certificate: %s" % ("verified for %s" % printable(host["host"]) if tls["verified"] else
                                   "not verified: %s" % printable(tls["error"]))
    elif host["extensions"]:
        yield "TLS: %s" % (printable(tls["error"]) if tls else "not offered")
    for name, command in (("mail", "MAIL FROM:<>"), ("rcpt", "RCPT TO:<postmaster@%s>" % domain)):
        if host[name]:
            yield "%s: %s" % (command, host[name])
    yield host["error"] or ("it would take mail" if host["takes_mail"] else "it would not take mail now")


# -- --check

class Finding(NamedTuple):
    level: str                  # ok, warning or error
    what: str
    text: str


VOLATILE = {"tmpfs": "is lost at a power cut", "ramfs": "is lost at a power cut", "vfat": "renames are not atomic",
            "exfat": "renames are not atomic", "msdos": "renames are not atomic", "nfs": "errors may show too late",
            "nfs4": "errors may show too late", "cifs": "errors may show too late"}


def check(cfg: Config, as_json: bool) -> int:
    """Look at configuration, DNS, ports and spool; say what is wrong.  Nothing is changed."""
    findings = check_config(cfg) + check_spool(cfg) + check_ports(cfg) + check_certificate(cfg)
    until = time.monotonic() + CHECK_S
    names = [name for name in cfg.domains if name[0] != "."]
    tasks: List[Callable[[], List[Finding]]] = [functools.partial(check_hostname, cfg, Resolver(cfg.nameservers))]
    tasks += [functools.partial(check_domain, cfg, cfg.domains[name], Remembering(cfg.nameservers), until) for name in names]
    for name, result in zip(["hostname", *names], in_time(CHECK_S, tasks)):
        findings += [Finding("warning", name, str(result))] if isinstance(result, Exception) else result
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        for finding in findings:
            print("%-8s %s: %s" % (finding.level, finding.what, printable(finding.text)))
    return EX_CONFIG if any(finding.level == "error" for finding in findings) else EX_OK


def check_config(cfg: Config) -> List[Finding]:
    out = [Finding("ok", "config", "%s: %d domains" % (cfg.file, len(cfg.domains)))]
    if not cfg.domains:
        out.append(Finding("warning", "config", "no domain is served: all mail will be refused"))
    for option, address in (("[alerts] mail", cfg.alerts_mail), ("[bounces] postmaster", cfg.bounces_postmaster)):
        domain = address.rpartition("@")[2].lower()
        if address and cfg.domain(domain) is not None:
            out.append(Finding("warning", "config", "%s = %s: this relay serves %s, so that what it has to tell would wait for "
                               "the very primary that is down" % (option, address, domain)))
    try:
        command = shlex.split(cfg.alerts_command)[:1]
        if command and shutil.which(command[0]) is None:
            out.append(Finding("error", "config", "[alerts] command: there is no program %s" % command[0]))
    except ValueError as error:
        out.append(Finding("error", "config", "[alerts] command: %s" % error))
    if cfg.log == "syslog" and (syslog is None or not os.path.exists("/dev/log")):
        out.append(Finding("warning", "config", "log = syslog, but there is %s: nothing will be logged" % (
            "no /dev/log" if syslog else "no syslog module")))
    try:
        read_secret(cfg.bounces_password)
    except OSError as error:
        out.append(Finding("error", "config", "[bounces] password cannot be read: %s" % describe(error)))
    for path in recipient_paths(cfg):
        try:
            remark = RecipientFile(path).remark
            out += [Finding("warning", "config", remark)] if remark else []
        except OSError as error:
            out.append(Finding("error", "config", "recipients = file:%s: %s" % (path, error.strerror)))
    if time.time() < os.path.getmtime(__file__) - 86400.0:
        out.append(Finding("warning", "clock", "it is %s here: before this program was written" % format_day(time.time())))
    return out


def check_spool(cfg: Config) -> List[Finding]:
    out: List[Finding] = []
    folder = cfg.spool
    while not os.path.isdir(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    try:
        account = Account(cfg.user)
        who = cfg.user or "this account"
        if folder == cfg.spool:         # else root makes it, and gives it to the account
            out += [Finding("error", "spool", "%s cannot write %s" % (who, path))
                    for path in denied(account, [(folder, os.R_OK | os.W_OK | os.X_OK)])]
        if account.name:                # root may read and write everything, but is given up before these are
            needed = recipient_paths(cfg) + secret_paths(cfg)
            out += [Finding("error", "user", "%s cannot read %s" % (who, path))
                    for path in denied(account, [(path, os.R_OK) for path in needed])]
            reread = filter(None, (cfg.file, cfg.tls_certificate, cfg.tls_key))
            out += [Finding("warning", "user", "%s cannot read %s: SIGHUP and renewals will fail" % (who, path))
                    for path in denied(account, [(path, os.R_OK) for path in reread])]
        if cfg.log not in ("stderr", "syslog"):
            place = cfg.log if os.path.exists(cfg.log) else os.path.dirname(cfg.log)
            if os.path.isdir(cfg.log) or denied(account, [(place, os.W_OK)]):
                out.append(Finding("error", "log", "%s cannot write %s" % (who, cfg.log)))
        if os.path.lexists(cfg.spool) and folder != cfg.spool:
            out.append(Finding("error", "spool", "%s is not a directory" % cfg.spool))
        elif folder != cfg.spool and not os.access(folder, os.W_OK | os.X_OK):
            out.append(Finding("error", "spool", "%s cannot be written" % folder))
    except OSError as error:
        out.append(Finding("error", "user", describe(error)))
    kind = file_system(folder)
    if kind in VOLATILE:
        out.append(Finding("warning", "spool", "%s is on %s: mail there %s" % (cfg.spool, kind, VOLATILE[kind])))
    free = Spool(folder).free()
    level = "error" if free < cfg.min_free_space else "warning" if free < 2 * cfg.min_free_space else "ok"
    out.append(Finding(level, "spool", "%s: %s free%s" % (
        cfg.spool, format_size(free), ", mail is refused below %s" % format_size(cfg.min_free_space) if level != "ok" else "")))
    return out


def denied(account: Account, wanted: Sequence[Tuple[str, int]]) -> List[str]:
    """Paths that the account may not use so: asked in a child that has become it."""
    if not account.name:
        return [path for path, mode in wanted if not os.access(path, mode)]
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.initgroups(account.name, account.gid)
            account.become()
            os.write(writer, bytes(os.access(path, mode) for path, mode in wanted))
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as answers:
        allowed = answers.read().ljust(len(wanted), b"\0")
    os.waitpid(child, 0)
    return [path for (path, _), may in zip(wanted, allowed) if not may]


def file_system(folder: str) -> str:
    """The type of the file system a folder is on, where /proc tells."""
    best, kind = "", ""
    try:
        with open("/proc/mounts", encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                _, point, its, *_ = line.split()
                point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), point)     # a blank is \040
                if (os.path.realpath(folder) + "/").startswith(point.rstrip("/") + "/") and len(point) >= len(best):
                    best, kind = point, its
    except (OSError, ValueError):
        pass
    return kind


def check_ports(cfg: Config) -> List[Finding]:
    out = []
    for where in [*cfg.listen, *cfg.odmr_listen, *filter(None, [cfg.status_listen])]:
        sock = socket.socket(socket.AF_INET6 if ":" in where.host else socket.AF_INET, socket.SOCK_STREAM)
        with sock:
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if ":" in where.host:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind((where.host, where.port))
                sock.listen(1)
                out.append(Finding("ok", "port", "%s is free" % str(where)))
            except OSError as error:
                ours = error.errno == errno.EADDRINUSE and is_running(cfg)
                hint = "; ports below 1024 need root or a service manager" if error.errno == errno.EACCES else ""
                out.append(Finding("ok" if ours else "error", "port", "%s: %s%s" % (
                    where, "in use by the running relay" if ours else error.strerror, hint)))
    return out


def is_running(cfg: Config) -> bool:
    directory = -1
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            directory = os.open(cfg.spool, os.O_RDONLY | os.O_CLOEXEC)
            sock.connect(short_path(os.path.join(cfg.spool, "control"), directory))
            return True
        except OSError:
            return False
        finally:
            if directory >= 0:
                os.close(directory)


def check_certificate(cfg: Config) -> List[Finding]:
    if not cfg.tls_certificate:
        return [Finding("ok", "tls", "no certificate: STARTTLS is not offered")]
    if ssl is None:
        return [Finding("warning", "tls", "this Python has no ssl module: STARTTLS is not offered")]
    try:
        Certificate(cfg.tls_certificate, cfg.tls_key)
        with open(cfg.tls_certificate, "rb") as file:
            facts = parse_pem(file.read())
    except (OSError, ValueError) as error:
        return [Finding("error", "tls", "%s: %s" % (cfg.tls_certificate, error))]
    left = facts.until - time.time()
    level, text = "ok", "for %s, until %s" % (", ".join(facts.names), format_day(facts.until))
    if left < 0:
        level, text = "error", "expired on %s" % format_day(facts.until)
    elif left < CERTIFICATE_WARNING_S:
        level, text = "warning", "expires in %s" % format_duration(left)
    elif facts.since > time.time():
        level, text = "warning", "is not valid before %s" % format_day(facts.since)
    out = [Finding(level, "tls", "%s: %s" % (cfg.tls_certificate, text))]
    if not facts.is_for(cfg.hostname):
        out.append(Finding("warning", "tls", "%s: not for %s, but for %s" % (
            cfg.tls_certificate, cfg.hostname, ", ".join(facts.names) or "no name")))
    return out


def check_hostname(cfg: Config, resolver: Resolver) -> List[Finding]:
    """Its name must lead here and, as many receivers of notices insist, its address back to the name."""
    name = cfg.hostname
    if name.split(".")[-1] in ("localhost", "localdomain", "local") or "." not in name:
        return [Finding("warning", "hostname", "%s is no name that others know this host by: set hostname" % name)]
    try:
        addresses = resolver.addresses(name)
    except DnsError as error:
        return [Finding("warning", "hostname", str(error))]
    if not addresses:
        return [Finding("warning", "hostname", "%s has no address" % name)]
    out = [Finding("ok", "hostname", "%s: %s%s" % (name, ", ".join(addresses), "" if any(map(is_local, addresses)) else
                                                   ", none of them of this machine: it is behind a NAT, or the name is wrong"))]
    for address in addresses:
        if ipaddress.ip_address(address).is_global:
            try:
                names = resolver.query(ipaddress.ip_address(address).reverse_pointer, PTR)
            except DnsError:
                names = []
            what = "is called " + ", ".join(names) if names else "has no name: many servers refuse notices from there"
            out.append(Finding("ok" if name in names else "warning", "hostname", "%s %s" % (address, what)))
    return out


def check_domain(cfg: Config, one: DomainConfig, resolver: Resolver, until: float) -> List[Finding]:
    """The MX records must name this host, and a better one; the primary must be found, and should answer."""
    out = []
    try:
        records: List[Tuple[int, str]] = resolver.query(one.name, MX)
        ours = [preference for preference, host in records if host == cfg.hostname]
        best = min(records, default=(0, ""))[0]
        if not ours:
            out.append(Finding("warning", one.name, "its MX records do not name %s: no mail will come here" % cfg.hostname))
        elif min(ours) <= best:
            out.append(Finding("warning", one.name, "its MX records name no better host than %s" % cfg.hostname))
        else:
            out.append(Finding("ok", one.name, "MX: %s" % ", ".join("%d %s" % record for record in sorted(records))))
    except DnsError as error:
        out.append(Finding("warning", one.name, str(error)))
    try:
        if one.username and not read_secret(one.password):
            out.append(Finding("error", one.name, "the password of %s is empty" % one.username))
    except OSError as error:
        out.append(Finding("error", one.name, "the password of %s cannot be read: %s" % (one.username, describe(error))))
    if one.primary in WAITS:
        return out + check_collected(cfg, one)
    plan = probe_plan(cfg, one.name, one, resolver)
    try:
        hops, warning = find_route(plan)
        out.append(Finding("warning" if warning else "ok", one.name, "primary: %s%s" % (
            ", ".join(map(str, hops)), " (%s)" % warning if warning else "")))
    except PeerError as error:
        return [*out, Finding("error", one.name, str(error))]
    visit: Dict[str, Any] = {"error": "no answer"}
    for hop in hops:
        visit = Visit(plan, hop, until, "").run()
        if not visit["error"]:
            return [*out, Finding("ok", one.name, "%s answers in %.0f ms%s" % (
                str(hop), visit["connect_seconds"] * 1000, _size_note(cfg, visit["size"])))]
    return [*out, Finding("warning", one.name, "its primary does not answer now: %s" % visit["error"])]


def _size_note(cfg: Config, size: Optional[int]) -> str:
    if size and (not cfg.max_message_size or size < cfg.max_message_size):
        return "; it takes messages up to %s, which is then what this relay announces (max_message_size = %s)" % (
            format_size(size), format_size(cfg.max_message_size) if cfg.max_message_size else "0")
    return ""


# -- --print-unit

class Service(NamedTuple):
    """What a unit needs to know."""
    command: Tuple[str, ...]
    config: str
    spool: str
    log: str                    # a file, stderr or syslog
    user: str
    ports: Tuple[int, ...]
    files: int                  # descriptors
    remark: str


def find_service(config: str) -> Service:
    """From the configuration, or as it would be without one.  Raises ConfigError and Usage."""
    config = os.path.abspath(config)
    command = (sys.executable or "/usr/bin/python3", os.path.abspath(__file__), "--config", config)
    try:
        cfg: Optional[Config] = read_config(config)
    except OSError as error:
        cfg, remark = None, "%s: %s.  Set  spool = %s  in it" % (config, error.strerror, STATE_SPOOL)
    if cfg is None:
        service = Service(command, config, STATE_SPOOL, "stderr", "", (SMTP_PORT,), 65536, remark)
    else:
        ports = tuple(where.port for where in [*cfg.listen, *cfg.odmr_listen, *filter(None, [cfg.status_listen])])
        service = Service(command, config, cfg.spool, cfg.log, cfg.user, ports, max(65536, 3 * cfg.max_connections), "")
    for path in (*command, service.spool, service.log):
        if not path.isprintable():
            raise Usage("%r cannot be named in a unit" % path)
    return service


STATE_SPOOL = "/var/lib/etrn_relay"


def quote_systemd(text: str, is_command: bool = False) -> str:
    """A word of systemd.unit(5), where % starts a specifier; in a command, $ starts a variable."""
    text = text.replace("%", "%%").replace("$", "$$" if is_command else "$")
    if not text or re.search(r"[^\w/.:@+=,%$-]", text):
        return '"%s"' % text.replace("\\", "\\\\").replace('"', '\\"')
    return text


SYSTEMD = """\
# etrn_relay.service, for /etc/systemd/system.  Then:
#   systemctl daemon-reload && systemctl enable --now etrn_relay
# With  log = syslog  the journal's lines have no second time stamp.
%(remark)s[Unit]
Description=etrn_relay, a backup mail exchanger
Wants=network-online.target
After=network-online.target nss-lookup.target

[Service]
Type=notify
ExecStart=%(command)s
ExecReload=/bin/sh -c "kill -HUP ${MAINPID}"
WatchdogSec=60
Restart=on-failure
RestartSec=5
# A wrong command line or configuration does not get better.
RestartPreventExitStatus=64 78
TimeoutStopSec=15
LimitNOFILE=%(files)d

%(account)s
CapabilityBoundingSet=%(capabilities)s
AmbientCapabilities=%(capabilities)s
NoNewPrivileges=yes
UMask=0077
ProtectSystem=strict
%(writable)sProtectHome=%(home)s
PrivateTmp=%(tmp)s
PrivateDevices=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RemoveIPC=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target

# Sockets may be passed instead, and no capability is needed then: as etrn_relay.socket,
#   [Socket]
#   ListenStream=0.0.0.0:25
#   ListenStream=[::]:25
#   BindIPv6Only=ipv6-only
#   [Install]
#   WantedBy=sockets.target
"""


def format_systemd(service: Service) -> str:
    """Where the spool is below /var/lib, systemd makes it, for an account that exists while the service runs."""
    account, writable = [], []
    if is_inside(service.spool, "/var/lib"):
        account.append("User=%s" % service.user if service.user else "DynamicUser=yes")
        account.append("StateDirectory=%s" % quote_systemd(os.path.relpath(service.spool, "/var/lib")))
        account.append("StateDirectoryMode=0700")
        account.append("# That account must be able to read the configuration, and the files that it names.")
    else:
        account.append("User=%s" % service.user if service.user else
                       "# For an account of its own, set  user,  or  spool = %s.\nUser=root" % STATE_SPOOL)
        account.append("ExecStartPre=+%s" % " ".join(quote_systemd(word, True) for word in [
            shutil.which("install") or "/usr/bin/install", "-d", "-m", "0700", "-o", service.user or "root", service.spool]))
        writable.append(service.spool)
    if service.log.startswith("/"):
        writable.append(os.path.dirname(service.log))
    paths = [*service.command, service.spool, service.log]
    return SYSTEMD % {
        "remark": "# %s.\n" % service.remark if service.remark else "", "files": service.files, "account": "\n".join(account),
        "command": " ".join(quote_systemd(word, True) for word in service.command),
        "capabilities": "CAP_NET_BIND_SERVICE" if any(0 < port < 1024 for port in service.ports) else "",
        "writable": "ReadWritePaths=%s\n" % " ".join(map(quote_systemd, writable)) if writable else "",
        # what a unit hides cannot be run from there
        "home": "read-only" if any(is_inside(path, "/home", "/root", "/run/user") for path in paths) else "yes",
        "tmp": "no" if any(is_inside(path, "/tmp", "/var/tmp") for path in paths) else "yes"}


def is_inside(path: str, *folders: str) -> bool:
    return any(path.startswith(folder + "/") for folder in folders)


OPENRC = """\
#!/sbin/openrc-run
# /etc/init.d/etrn_relay, executable.  Then:  rc-update add etrn_relay && rc-service etrn_relay start
# It starts as root and becomes the account that  user  in the configuration names.
%(remark)s
name="etrn_relay"
description="A backup mail exchanger"
supervisor=supervise-daemon
# Both are evaluated once more, hence quoted twice.
command=%(program)s
command_args=%(arguments)s
umask=077
no_new_privs=yes
respawn_delay=5
respawn_max=0
rc_ulimit="-n %(files)d"
%(error_log)sextra_started_commands="reload"

depend() {
	need net
	use dns logger
	after firewall
}

start_pre() {
	checkpath -d -m 0700%(owner)s %(spool)s
}

reload() {
	ebegin "Rereading the configuration of etrn_relay"
	supervise-daemon "$RC_SVCNAME" --signal HUP
	eend $?
}
"""


def format_openrc(service: Service) -> str:
    words = [shlex.quote(word) for word in service.command]
    return OPENRC % {
        "remark": "# %s.\n" % service.remark if service.remark else "", "files": service.files,
        "program": shlex.quote(words[0]), "arguments": shlex.quote(" ".join(words[1:])),
        "owner": " -o " + shlex.quote(service.user) if service.user else "", "spool": shlex.quote(service.spool),
        "error_log": "error_log=/var/log/etrn_relay.log\n" if service.log == "stderr" else ""}


PROCD = """\
#!/bin/sh /etc/rc.common
# /etc/init.d/etrn_relay, executable.  Then:  service etrn_relay enable && service etrn_relay start
# It starts as root and becomes the account that  user  in the configuration names.
# /var is in memory on most routers: the spool belongs on a disk or stick.
%(remark)s
USE_PROCD=1
START=95
STOP=10

start_service() {
	procd_open_instance
	procd_set_param command %(command)s
	procd_set_param file %(config)s
	procd_set_param respawn 3600 5 0
	procd_set_param limits nofile="%(files)d %(files)d"
	procd_set_param no_new_privs 1
	procd_set_param reload_signal HUP
	procd_set_param stderr 1
	procd_set_param term_timeout 10
	procd_close_instance
}
"""


def format_procd(service: Service) -> str:
    remark = service.remark.replace(STATE_SPOOL, "/mnt/usb/etrn_relay")
    return PROCD % {"remark": "# %s.\n" % remark if remark else "", "files": service.files,
                    "command": " ".join(map(shlex.quote, service.command)), "config": shlex.quote(service.config)}


LAUNCHD = """\
<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<!-- /Library/LaunchDaemons/etrn_relay.plist.  Then: launchctl bootstrap system that file.
     It starts as root and becomes the account that  user  in the configuration names.%(remark)s -->
<plist version="1.0">
<dict>
	<key>Label</key><string>etrn_relay</string>
	<key>ProgramArguments</key>
	<array>
%(command)s
	</array>
	<key>RunAtLoad</key><true/>
	<key>KeepAlive</key><dict><key>SuccessfulExit</key><false/></dict>
	<key>ThrottleInterval</key><integer>10</integer>
	<key>ExitTimeOut</key><integer>15</integer>
	<key>Umask</key><integer>63</integer>
	<key>SoftResourceLimits</key><dict><key>NumberOfFiles</key><integer>%(files)d</integer></dict>
	<key>HardResourceLimits</key><dict><key>NumberOfFiles</key><integer>%(files)d</integer></dict>
	<key>StandardErrorPath</key><string>%(error)s</string>
</dict>
</plist>
"""


def format_launchd(service: Service) -> str:
    def escape(text: str) -> str:
        return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    remark = service.remark.replace("-", "\u2010") if "--" in service.remark else service.remark    # XML comments forbid it
    return LAUNCHD % {
        "remark": "\n     %s." % remark if remark else "", "files": service.files,
        "command": "\n".join("\t\t<string>%s</string>" % escape(word) for word in service.command),
        "error": "/var/log/etrn_relay.log" if service.log == "stderr" else "/dev/null"}


UNITS: Dict[str, Callable[[Service], str]] = {
    "systemd": format_systemd, "openrc": format_openrc, "procd": format_procd, "launchd": format_launchd}


def format_unit(kind: str, config: str) -> str:
    return UNITS[kind](find_service(config))


def check_collected(cfg: Config, one: DomainConfig) -> List[Finding]:
    """primary = atrn or etrn: whether anybody can come for the mail."""
    if not one.username:
        return [Finding("error", one.name, "primary = %s needs a username: without one its mail cannot leave" % one.primary)]
    if one.primary == "atrn" and not cfg.odmr_listen:
        return [Finding("error", one.name, "primary = atrn needs odmr_listen: without it no mail can be collected")]
    if one.primary == "etrn" and one.etrn == "none":
        return [Finding("error", one.name, "primary = etrn, but etrn = none: nobody may tell where the primary is")]
    home = known_homes(Spool(cfg.spool).load_state(), cfg).get(one.name)
    if home:
        return [Finding("ok", one.name, "primary: at %s since an authenticated ETRN of %s" % (home, one.username))]
    return [Finding("ok", one.name, "primary: mail %s of %s" % (WAITS[str(one.primary)], one.username))]


# -- --demo

class DemoHandler(socketserver.StreamRequestHandler):
    """As much of an SMTP server as a demonstration of a primary needs."""

    def handle(self) -> None:
        self.say("220 mail.example.com the primary is back")
        for line in self.rfile:
            verb = line[:4].upper()
            if verb == b"EHLO":
                self.say("250-mail.example.com\r\n250 PIPELINING")
            elif verb == b"DATA":
                self.say("354 go on")
                message = b"".join(iter(self.rfile.readline, b".\r\n"))
                self.server.messages.append(message)        # type: ignore[attr-defined]
                self.say("250 2.0.0 taken")
            else:
                self.say("221 bye" if verb == b"QUIT" else "250 ok")

    def say(self, text: str) -> None:
        self.wfile.write(text.encode("ascii") + b"\r\n")


class DemoPrimary(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, port: int) -> None:
        self.messages: List[bytes] = []
        self.open: List[socket.socket] = []
        super().__init__(("127.0.0.1", port), DemoHandler)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.append(request)
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection cut by close()."""

    def close(self) -> None:
        """As abruptly as a power cut."""
        self.shutdown()
        self.server_close()
        for sock in self.open:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass                    # it had ended before


DEMO_CONFIG = """\
[relay]
hostname = backup.example.net
listen = 127.0.0.1:0
log = relay.log
min_free_space = 0
[domain example.com]
primary = 127.0.0.1:%d
probe_interval = 1s
"""
DEMO_WAIT_S = 8.0               # for each step; the whole demonstration takes under 20 seconds


class Demo:
    """A whole outage with real SMTP on loopback, in a temporary spool of which nothing remains."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say_line = say
        self.began = time.monotonic()
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]       # where the primary will be

    def say(self, text: str) -> None:
        first, *rest = text.rstrip("\n").split("\n")
        self.say_line("%5.1f s  %s" % (time.monotonic() - self.began, first))
        for line in rest:
            self.say_line(("         %s" % line).rstrip())

    def play(self) -> int:
        with tempfile.TemporaryDirectory(prefix="etrn-demo-") as folder:
            cfg = parse_config(DEMO_CONFIG % self.port, os.path.join(folder, "demo.conf"))
            spool = Spool(cfg.spool)
            spool.open()
            server = Server(cfg, spool, Log(cfg.log, cfg.log_level, cfg.hostname))
            server.listen()
            relay = threading.Thread(target=server.run, name="relay")
            relay.start()
            try:
                return self._play(cfg, server.manager.listeners[0])
            finally:
                server.stop()
                relay.join()
                spool.close()

    def _play(self, cfg: Config, relay: Endpoint) -> int:
        self.say_line("One outage of a mail server, played with real SMTP on this machine's loopback address;\n"
                      "mail and log are in a temporary folder that is removed at the end.\n")
        self.say("The relay is up on %s, as backup MX for example.com." % str(relay))
        self.say("The primary is down: nothing answers on 127.0.0.1:%d.  Five messages come in:" % self.port)
        for number in range(1, 6):
            self.say("  sender%d@example.org: %s" % (number, self.send(relay, number)))
        self.wait(lambda: self.status(cfg)["primary"] == "down")
        rows: List[Dict[str, Any]] = []
        for answer in ask_relay(cfg, {"command": "list", "what": "all"}):
            for id, state, due, expires, failures in answer.get("rows", ()):
                rows += queue_rows(Spool(cfg.spool).read_sidecar(id), answer, state, due, expires, failures)
        rows.sort(key=lambda row: str(row["id"]))
        self.say("They are safe on disk.  --queue shows:\n" + format_queue(rows, time.time()))
        self.say("The primary comes back.  Nobody tells the relay.")
        since = time.monotonic()
        primary = DemoPrimary(self.port)
        back = self.wait(lambda: len(primary.messages) == 5)
        self.say("The primary has %d of 5 messages, %.1f s after its return." % (len(primary.messages), time.monotonic() - since))
        primary.close()
        self.say("The primary goes down again, and one more message comes in:")
        self.say("  sender6@example.org: %s" % self.send(relay, 6))
        self.wait(lambda: self.status(cfg)["primary"] == "down")
        self.say("The primary comes back and asks for its mail:")
        primary = DemoPrimary(self.port)
        with smtplib.SMTP(relay.host, relay.port, "mail.example.com", DEMO_WAIT_S) as client:
            client.ehlo()
            code, text = client.docmd("ETRN", "example.com")
            self.say("  ETRN example.com\n  %d %s" % (code, text.decode("ascii")))
        asked = self.wait(lambda: len(primary.messages) == 1)
        self.say("The primary has it." if asked else "The primary did not get it.")
        done = back and asked and self.wait(lambda: not self.status(cfg)["queued"])     # its answer may be under way
        primary.close()
        self.say("The queue is empty.  Nothing was lost." if done else "Something went wrong.")
        self.say_line("\nNext, with a configuration to try out and to edit:  etrn_relay.py --config etrn.conf.sample")
        return EX_OK if done else EX_TEMPFAIL

    def send(self, relay: Endpoint, number: int) -> str:
        with smtplib.SMTP(relay.host, relay.port, "sender.example.org", DEMO_WAIT_S) as client:
            client.ehlo()
            client.docmd("MAIL", "FROM:<sender%d@example.org>" % number)
            client.docmd("RCPT", "TO:<user@example.com>")
            code, text = client.data(b"Subject: message %d\r\n\r\nHello.\r\n" % number)
        return "%d %s" % (code, text.decode("ascii"))

    @staticmethod
    def status(cfg: Config) -> Dict[str, Any]:
        one: Dict[str, Any] = last_answer(cfg, {"command": "status"})["domains"]["example.com"]
        return one

    @staticmethod
    def wait(is_so: Callable[[], bool]) -> bool:
        end = time.monotonic() + DEMO_WAIT_S
        while not is_so() and time.monotonic() < end:
            time.sleep(0.05)
        return is_so()


if __name__ == "__main__":
    sys.exit(main())
