"""A plugin of pytest: a test that silently does not run fails the run, in one process or in several."""

import pytest

# A skip for any other reason counts as a failure: see `pytest_sessionfinish`.
KNOWN_SKIPS = ("needs a GPU", "needs the interpreter, which a GPU replaces", "needs the Debian packages")

_not_run: dict[str, str] = {}  # what was collected or asked for, and why it did not run
_selected: set[str] = set()


def pytest_collection_finish(session):
    _selected.update(item.nodeid for item in session.items)


def pytest_collectreport(report):
    if report.nodeid.endswith(".py") and report.passed and not report.result:
        _not_run[report.nodeid] = "no tests in it"
    if report.skipped:
        _not_run[report.nodeid] = str(report.longrepr[2])


def pytest_runtest_logreport(report):
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(known in reason for known in KNOWN_SKIPS):
            _not_run[report.nodeid] = reason
        _selected.discard(report.nodeid)
    elif report.when == "call" or report.failed:
        _selected.discard(report.nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node, ids):
    _selected.update(ids)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    _not_run.update(getattr(node, "workeroutput", {}).get("not_run", {}))


def pytest_sessionfinish(session, exitstatus):
    if hasattr(session.config, "workeroutput"):  # a worker of several: where they meet it is judged
        session.config.workeroutput["not_run"] = _not_run
        return
    if exitstatus != pytest.ExitCode.OK or session.config.option.collectonly:
        return
    _not_run.update((nodeid, "collected, but it never ran") for nodeid in _selected)
    if _not_run:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    if _not_run:
        terminalreporter.section("tests that did not run, for no known reason", red=True)
        for nodeid, reason in _not_run.items():
            terminalreporter.write_line(f"{nodeid}: {reason}")
