"""`lines push`: an output onto the Hub."""

from __future__ import annotations

from lines_cli.cli import options as opt


def push(
    output: opt.Pushed,
    repo: opt.Repository,
    *,
    private: opt.Private = False,
    revision: opt.Revision = None,
    dry_run: opt.DryPush = False,
    cache: opt.Cache = None,
    json: opt.JsonPushed = False,
    quiet: opt.Quiet = False,
    log_json: opt.LogJson = False,  # noqa: ARG001 - heeded before the command line is parsed
) -> None:
    """Put an output of lines on the Hugging Face Hub, or into an object store.

    \b
      lines push OUT org/name                    # a folder that lines wrote
      lines push OUT org/name --private
      lines push OUT org/name --revision v2      # a branch of its own
      lines push OUT org/name --dry-run          # what would be pushed
      lines push OUT s3://bucket/folder          # into an object store

    Pushed are the files that OUT's lines_recipe.yaml records, that file and the model card, and nothing else; each is
    first read and held against the record. On the Hub an earlier output of lines is replaced, and weights that somebody
    else put there are not. After a failure the same command goes on: what the Hub has already is not sent again.

    In an object store weights come first and the recipe last; another output there is not replaced.
    """
    from lines_cli.api.push import push_output
    from lines_cli.api.push_objects import push_to_objects
    from lines_cli.cli import console
    from lines_cli.storage.object_store import is_url

    if is_url(repo):
        told = push_to_objects(
            output,
            repo,
            private=private,
            revision=revision,
            dry_run=dry_run,
            track=console.progress(quiet=quiet),
            say=(lambda _: None) if quiet else console.remark,
        )
        console.show_pushed(told, json=json, quiet=quiet)
        return
    told = push_output(
        output,
        repo,
        private=private,
        revision=revision,
        cache=cache,
        dry_run=dry_run,
        track=console.progress(quiet=quiet),
        quiet=quiet,
        say=(lambda _: None) if quiet else console.remark,
    )
    console.show_pushed(told, json=json, quiet=quiet)
