"""Coordination of the processes of one run: consistency checks before joint computation, and detection of lost ones.

All communication uses the key-value store of `jax.distributed`, which process 0 serves; no device is involved. With a
single process every function returns at once.

Guarantees (all tested): processes that see different things end, each naming the difference; a process
that waits logs which one it waits for; what one process cannot read ends all with its one line; a process that dies, is
stopped or ends with an error is named by the others, which end too. If a repetition would end in the same error, they
take its exit code, so that a script that sees theirs first does not start the run again (2 in place of it while they
still compare what they see); else they end with 69.
"""

import atexit
import contextlib
import itertools
import json
import logging
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from ibjax import errors
from ibjax.errors import InputError, PeerError

PATIENCE = 300  # seconds that a process waits for the others to reach the same point
SILENCE = 30  # seconds without a sign of life after which a process counts as lost
_INTERVAL = 2  # seconds between signs of life (heartbeats)
_GRACE = 10  # seconds that the other processes have to end by themselves after one has ended with an error
_OF_XLA = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")  # codes of its errors
_topics = itertools.count()
log = logging.getLogger(__name__)


# ---- agreement ---------------------------------------------------------------------------------------------


def agree(topic: str, values: Mapping[str, Any], advice: str = "start all processes with one command") -> None:
    """Raises InputError in every process unless all processes call this with equal values; each waits for all others.

    The message states the first value that differs, in which processes, and ends with `advice`.
    """
    if problem := difference(topic, values):
        raise InputError(f"{problem}; {advice}")


def difference(topic: str, values: Mapping[str, Any]) -> str:
    """The first value that differs between the processes, in words; "" where all call this with equal values."""
    client = _client()
    if client is None:
        return ""

    def first(said):
        return next(filter(None, (_between(client, said[0], index, other) for index, other in said.items())), "")

    return _verdict(client, topic, dict(values), first, PATIENCE)


@contextlib.contextmanager
def together(topic: str) -> Iterator[None]:
    """A block that all processes leave well, or that ends all of them with one InputError.

    Where one process meets an InputError in the block, it is raised there, and its message in all others, with the name
    of that process. There is no limit to how long a process waits for the others, as the block may read large files: a
    process that is lost ends them (see `watch`).
    """
    own = None
    try:
        yield
    except InputError as error:
        own = error
    client = _client()
    if client is None:
        if own is not None:
            raise own
        return

    def first(said):
        failed = [index for index, other in said.items() if other["values"]["error"]]
        return f"{_name(client, failed[0])}: {said[failed[0]]['values']['error']}" if failed else ""

    problem = _verdict(client, topic, {"error": "" if own is None else str(own)}, first, math.inf)
    if own is not None:
        raise own
    if problem:
        raise InputError(problem)


def _verdict(client, topic, values, judge, patience):
    """What process 0 finds with `judge` in {process: {"topic", "values"}} of all processes; "" where all is well."""
    key, me = f"ibjax/agree/{next(_topics)}", jax.process_index()
    client.key_value_set(f"{key}/{me}", json.dumps({"topic": topic, "values": values}, sort_keys=True))
    if me:
        return _wait(client, f"{key}/verdict", 0, topic, patience)
    everyone = range(jax.process_count())
    said = {index: json.loads(_wait(client, f"{key}/{index}", index, topic, patience)) for index in everyone}
    lost = (
        f"processes 0 and {index} are not at the same point: '{topic}' and '{other['topic']}'"
        for index, other in said.items()
        if other["topic"] != topic
    )
    problem = next(lost, "") or judge(said)
    client.key_value_set(f"{key}/verdict", problem)
    return problem


def word_of_first(topic: str, word: str = "") -> str:
    """Broadcasts the `word` of process 0 to all processes."""
    client = _client()
    if client is None:
        return word
    key = f"ibjax/word/{next(_topics)}"
    if jax.process_index() == 0:
        client.key_value_set(key, word)
        return word
    return _wait(client, key, 0, topic, PATIENCE)


def sees(file: Path, token: str) -> bool:
    """Whether this process can read the token that process 0 has written; network folders may need a few seconds."""
    for wait in (0.0, 0.5, 1.0, 2.0, 4.0, 8.0):
        time.sleep(wait)
        with contextlib.suppress(OSError):
            if file.read_text(encoding="utf-8", errors="replace") == token:
                return True
    return False


def _between(client, own, index, other):
    for name in {**own["values"], **other["values"]}:
        here, there = own["values"].get(name), other["values"].get(name)
        if here != there:
            said = f"{name}: {here!r} in process 0, {there!r} in {_name(client, index)}"
            return f"the processes see different {own['topic']}: {said}"
    return None


def _wait(client, key, index, topic, patience):
    """The value of a key that process `index` sets; logs which process it waits for.

    PeerError where a repetition may succeed: the other is slow, cannot be reached, or was interrupted.
    """
    started = told = time.monotonic()
    gone = False
    while True:
        with _only_timeouts(index):
            return client.blocking_key_value_get(key, int(1000 * _INTERVAL))
        if ended := _ended(client):
            code, message = next(iter(ended.values()))
            raise InputError(message) if code in errors.FINAL else PeerError(message)
        now = time.monotonic()
        if now - started > patience:
            raise PeerError(f"{_name(client, index)} has not come to '{topic}' within {patience} s")
        if gone:
            raise InputError(f"{_name(client, index)} has ended and never came to '{topic}'")
        gone = _has_left(client, index)  # if so, the value is looked for once more
        if now - told > 2 * _INTERVAL:
            log.info("waiting for %s to come to '%s', %.0f s", _name(client, index), topic, now - started)
            told = now + 3 * _INTERVAL


@contextlib.contextmanager
def _only_timeouts(index):
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise PeerError(f"process {index} cannot be reached ({str(error).splitlines()[0][:120]})") from None


def several() -> bool:
    """Whether this process is one of several of a run."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def _client():
    """The client of the key-value store; None if there is only one process."""
    if not several():
        return None
    from jax._src import distributed  # not public, but Orbax uses it too

    return distributed.global_state.client


def _name(client, index):
    """A process's name in messages, such as "process 1 of 4 (node3, pid 4711)"."""
    return _known(client, f"ibjax/name/{index}") or f"process {index} of {jax.process_count()}"


def _known(client, key):
    try:
        return client.key_value_try_get(key)
    except jax.errors.JaxRuntimeError:  # the key is not set
        return ""


def _has_left(client, index):
    """Whether a process has ended well."""
    return any(key.endswith(f"/{index}") for key, _ in client.key_value_dir_get("ibjax/left/"))


def _ended(client):
    """{process: (exit code, message)} for the processes that have ended with an error."""
    found = client.key_value_dir_get("ibjax/ended/")
    return {int(key.rpartition("/")[2]): tuple(json.loads(said)) for key, said in found}


# ---- signs of life -----------------------------------------------------------------------------------------


def watch() -> None:
    """Starts this process's heartbeat; from then on it ends if another process is lost or ends with an error."""
    client = _client()
    if client is None:
        return
    me = jax.process_index()
    name = f"process {me} of {jax.process_count()} ({socket.gethostname()}, pid {os.getpid()})"
    client.key_value_set(f"ibjax/name/{me}", name)
    _Watch(client, me, _Witness(name)).start()


class _Watch:
    """The threads that send the heartbeats of this process and check those of the others.

    Only process 0 checks all heartbeats; the others read its verdict, so traffic is linear in the number of processes.
    """

    def __init__(self, client, me, witness):
        self.client, self.me, self.witness = client, me, witness
        self.others = set(range(jax.process_count())) - {me}
        self.heard = time.monotonic()  # when process 0 last answered
        self.done = threading.Event()
        self.lock = threading.Lock()

    def start(self):
        atexit.register(self.leave)  # runs before JAX's own exit handler, which waits for the others
        errors.at_failure.append(self.fail)
        for loop in (self.talk, self.listen):
            threading.Thread(target=loop, daemon=True).start()

    def talk(self):
        """Sends heartbeats and reads the verdicts of process 0."""
        last, failed = {}, {}
        for beat in itertools.count():
            if self.done.wait(_INTERVAL):
                return
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # `listen` reports lasting failures
                self.client.key_value_set(f"ibjax/beat/{self.me}", str(beat), allow_overwrite=True)
                if self.me == 0:
                    self.judge(last)
                if lost := _known(self.client, "ibjax/lost"):
                    self.end(lost)
                for index, (code, text) in _ended(self.client).items():
                    if time.monotonic() - failed.setdefault(index, time.monotonic()) > _GRACE:
                        self.end(text, code if code in errors.FINAL else errors.EXIT_PEER_LOST)
                self.heard = time.monotonic()

    def listen(self):
        """Detects that process 0 no longer answers, without a call to it, which would return late or never."""
        while not self.done.wait(_INTERVAL):
            if time.monotonic() - self.heard > SILENCE:
                self.end(f"{_first(self)} has not answered for {SILENCE} s: it has died or is stopped")

    def judge(self, last):
        now = time.monotonic()
        beats = {int(key.rpartition("/")[2]): beat for key, beat in self.client.key_value_dir_get("ibjax/beat/")}
        gone = {int(key.rpartition("/")[2]) for key, _ in self.client.key_value_dir_get("ibjax/left/")}
        for index in self.others - gone:
            beat, since = last.get(index, (None, now))
            last[index] = (beats.get(index), now if beats.get(index) != beat else since)
            if now - last[index][1] > SILENCE:
                text = (
                    f"{_name(self.client, index)} has given no sign of life for {SILENCE} s: it has died or is stopped"
                )
                self.client.key_value_set("ibjax/lost", text, allow_overwrite=True)
                time.sleep(2 * _INTERVAL)  # time for the others to read it
                self.end(text)

    def end(self, text, code=errors.EXIT_PEER_LOST):
        """Ends this process at once, even if its main thread is blocked."""
        with self.lock:
            if self.done.is_set():
                return
            self.done.set()
            goes_on = "" if code in errors.FINAL else "; the same command continues from the last checkpoint"
            print(f"error: {text}{goes_on}", file=sys.stderr, flush=True)
            self.witness.dismiss()
            os._exit(code)

    def leave(self):
        """Announces the normal end of this process, so that the others do not count it as lost."""
        if not self.done.is_set():
            self.done.set()
            self.witness.dismiss()
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self.client.key_value_set(f"ibjax/left/{self.me}", "", allow_overwrite=True)

    def fail(self, code, message, bug):
        """Reports an error to the other processes and ends; Python's own exit would wait for them, perhaps forever."""
        if may_be_of_a_peer(bug):  # report the lost process, if there is one
            log.info("%s; looking for a process that is lost", " ".join(message.split())[:200])
            self.done.wait(SILENCE + 4 * _INTERVAL)
        if bug is not None:
            traceback.print_exception(bug)
        with self.lock:
            self.done.set()
        self.witness.dismiss()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            text = f"{_name(self.client, self.me)} has ended: {message}"
            self.client.key_value_set(f"ibjax/ended/{self.me}", json.dumps([code, text]), allow_overwrite=True)
            deadline = time.monotonic() + _GRACE + 2 * _INTERVAL
            while self.me == 0 and time.monotonic() < deadline:  # the key-value store ends with this process
                left = {int(key.rpartition("/")[2]) for key, _ in self.client.key_value_dir_get("ibjax/left/")}
                if self.others <= left | set(_ended(self.client)):
                    break
                time.sleep(0.2)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def may_be_of_a_peer(error: Exception | None) -> bool:
    """Whether a collective may have raised it because another process is lost; `jit` raises some as ValueError."""
    return isinstance(error, RuntimeError) or (isinstance(error, ValueError) and bool(_OF_XLA.match(str(error))))


def _first(watch):
    return f"process 0, at {os.environ.get('JAX_COORDINATOR_ADDRESS') or 'the coordinator address'},"


class _Witness:
    """A shell process that prints a last message if this process is killed or aborted.

    If process 0 is killed, JAX's C++ code aborts the others at once, before any of their Python code can run.
    """

    def __init__(self, name):
        script = 'read -r line; if read -r end; then exit; fi; echo "$line" >&2'
        text = (
            f"error: {name} has ended without a word: it was killed, or crashed, or lost its connection to process 0; "
            f"the same command continues from the last checkpoint\n"
        )
        self.process = None
        with contextlib.suppress(OSError):
            self.process = subprocess.Popen(
                ["/bin/sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
            )
            self.say(text)

    def say(self, text):
        if self.process and self.process.stdin:
            with contextlib.suppress(OSError):
                self.process.stdin.write(text.encode())
                self.process.stdin.flush()

    def dismiss(self):
        """Cancels the message, as this process prints its own."""
        self.say("end\n")
