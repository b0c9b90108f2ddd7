"""Settings of this machine or team: environment variables, and a file for what they leave open.

The file is `settings.toml` in the user's configuration folder, or what `COVERCAL_SETTINGS` names: lines such as
`cache = "/data/covercal"`. A variable of the environment wins over the file.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_config_path

from covercal.errors import InputError

FILE = "COVERCAL_SETTINGS"
DEFAULT = "default"
ENVIRONMENT = "environment"


@dataclass(frozen=True, slots=True)
class Known:
    """A setting that there is.

    Attributes
    ----------
    variable
        In the environment.
    default
        What holds where nothing says otherwise, in words.
    meaning
        What it does.
    """

    variable: str
    default: str
    meaning: str


KNOWN = {
    "cache": Known("COVERCAL_CACHE", "the user's cache folder", "the artifact store"),
    "remote": Known("COVERCAL_REMOTE", "none", "a cache to share: s3://bucket/…, gs://…, az://…, or a shared folder"),
    "remote_write": Known("COVERCAL_REMOTE_WRITE", "0", "1: send what is built to the remote"),
    "remote_timeout": Known("COVERCAL_REMOTE_TIMEOUT", "60", "seconds that one request to the remote may take"),
    "offline": Known("COVERCAL_OFFLINE", "0", "1: go on without the remote"),
    "activation_memory": Known(
        "COVERCAL_ACTIVATION_MEMORY", "a quarter of what is free", "bytes of hidden states held in memory, such as 8G"
    ),
    "task_runner": Known(
        "COVERCAL_TASK_RUNNER", "threads", "where tasks run: threads (one after the other), dask, or ray"
    ),
    "cluster": Known("COVERCAL_CLUSTER", "one of this machine", "address of the Dask or Ray cluster, tcp://host:8786"),
    "workers": Known("COVERCAL_WORKERS", "2", "processes of a cluster of this machine; cells of a sweep at a time"),
    "notify": Known("COVERCAL_NOTIFY", "none", "Prefect block that is told of failed runs, such as webhook/covercal"),
    "reports_url": Known("COVERCAL_REPORTS_URL", "none", "where the store's folder of reports is served, for links"),
    "prefect_api_url": Known("PREFECT_API_URL", "a temporary server", "the Prefect server that runs go through"),
}


@dataclass(frozen=True, slots=True)
class Setting:
    """What holds for one setting, and who says so.

    Attributes
    ----------
    name, value
        The value is empty where the default holds.
    origin
        `environment`, `default`, or the settings file's path.
    """

    name: str
    value: str
    origin: str


def settings_file(environment: Mapping[str, str]) -> Path:
    """Return where the settings file is, or would be."""
    named = environment.get(FILE)
    return Path(named).expanduser() if named else user_config_path("covercal") / "settings.toml"


def read_file(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what the settings file says, by setting; nothing when there is none.

    Raises
    ------
    InputError
        When it cannot be read, is no TOML, or names a setting that there is not.
    """
    path = settings_file(environment)
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if environment.get(FILE):
            raise InputError(f"{FILE} names {path}, and there is no such file.") from None
        return {}
    except (OSError, UnicodeDecodeError) as cause:
        raise InputError(f"Settings file {path} cannot be read: {cause}.") from cause
    except tomllib.TOMLDecodeError as cause:
        raise InputError(f"Settings file {path} is not valid TOML: {cause}.") from cause
    return {name: _text(path, name, value) for name, value in found.items()}


def _text(path: Path, name: str, value: object) -> str:
    if name not in KNOWN:
        near = difflib.get_close_matches(name, KNOWN, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(KNOWN)}"
        raise InputError(f"Settings file {path} has no setting `{name}`; {hint}")
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, str | int | float):
        return str(value)
    raise InputError(f"Settings file {path}: `{name}` is a {type(value).__name__}; give a text or a number.")


def apply_settings(environment: MutableMapping[str, str] = os.environ) -> None:
    """Put what the settings file says into the environment, where the environment says nothing itself."""
    for name, value in read_file(environment).items():
        variable = KNOWN[name].variable
        if variable not in environment:
            environment[variable] = value
            _from_file.add(variable)


_from_file: set[str] = set()


def all_settings(environment: Mapping[str, str] = os.environ) -> list[Setting]:
    """Return every setting as it holds, whether the file has been applied already or not."""
    told = read_file(environment)
    path = str(settings_file(environment))
    found = []
    for name, known in KNOWN.items():
        if known.variable in environment and known.variable not in _from_file:
            found.append(Setting(name, without_secret(environment[known.variable]), ENVIRONMENT))
        elif name in told:
            found.append(Setting(name, without_secret(told[name]), path))
        else:
            found.append(Setting(name, "", DEFAULT))
    return found


def without_secret(value: str) -> str:
    """Return an address without the name and password that may stand in it."""
    return re.sub(r"(?<=://)[^/@]*@", "…@", value)
