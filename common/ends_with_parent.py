"""The first module that the fork server imports: from then on the server ends with the process that started it."""

from common.forkserver import end_with_parent

end_with_parent()
