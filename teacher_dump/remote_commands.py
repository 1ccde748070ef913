"""Commands of ``teacher-dump`` for object storage: upload, download."""

from pathlib import Path

import click

_ENVIRONMENT = """\b
URL is s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or az://CONTAINER/FOLDER. Credentials come from the environment:
  AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION; AWS_ENDPOINT_URL for any S3-compatible server
  GOOGLE_APPLICATION_CREDENTIALS
  AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY
  AWS_ALLOW_HTTP=true (or AZURE_..., GOOGLE_...) for an endpoint without TLS
"""


@click.command(epilog=_ENVIRONMENT)
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("url")
@click.option("--follow", is_flag=True, help="Go on while STORE is still being dumped, until every pass is complete there.")
def upload(store: Path, url: str, follow: bool) -> None:
    """Put STORE into object storage at URL, or bring what is there up to it.

    Students read it there: give the URL wherever a store's folder is expected. Every file is checked before it is sent,
    and what is there already is not sent again, so that an upload that was stopped goes on. Nothing is removed there.
    """
    from teacher_dump.transfer import upload as send

    click.echo(send(store, url, follow))


@click.command(epilog=_ENVIRONMENT)
@click.argument("url")
@click.argument("store", type=click.Path(path_type=Path))
def download(url: str, store: Path) -> None:
    """Copy the store at URL into the folder STORE, or bring an earlier copy up to it.

    A download that was stopped goes on. To train from URL this is not needed: files are then kept in a cache as they are read
    (folder TEACHERCACHE_CACHE, by default ~/.cache/teachercache; limit TEACHERCACHE_CACHE_SIZE, by default 100GB).
    """
    from teacher_dump.transfer import download as read

    click.echo(read(url, store))
